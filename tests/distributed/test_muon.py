"""`--optimizer muon`: its updates are the published ones, on every layout, after a resume and in the next stage.

Newton-Schulz is computed in float32 here (`--muon-fp32-matmul-prec high`). Layouts agree as they do with AdamW
(test_layouts.py): losses within 2e-6 and the last gradients within 1e-5 relative. The changes of the weights are
within 1e-3 of a reference in float64: five steps of Newton-Schulz multiply small singular values, and their
rounding, by up to 480.
"""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from support.layout_runs import EXPERTS, IN_HEAD, SMALL, assert_same, layout_job, write_random_model
from support.pretrain_jobs import Job, run_jobs
from torch import Tensor

from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.model.config import NeoSizes

RATE, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8
MUON = (
    f"--optimizer muon --muon-fp32-matmul-prec high --lr {RATE} --lr-decay-style constant --weight-decay {DECAY} "
    f"--adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --adam-eps {EPS} --max-broken-samples 0.5"
)
SIZES = {"separate": SMALL, "in-head": IN_HEAD, "experts": EXPERTS}
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Model -> flags of its runs, their steps, and the same flags for the reference: momentum, Nesterov, coefficients,
# scale of rows and columns, whether queries, keys and values are matrices of their own.
SETTINGS = {
    "separate": (
        "--muon-momentum 0.95 --muon-nesterov --muon-coefficient-type simple --muon-extra-scale-factor 0.2",
        3,
        (0.95, True, ((3.4445, -4.7750, 2.0315),) * 5, lambda rows, columns: 0.2 * max(rows, columns) ** 0.5, True),
    ),
    "in-head": (
        "--muon-no-split-qkv --muon-scale-mode shape_scaling --muon-extra-scale-factor 0.5",
        2,
        (0.9, False, QUINTIC, lambda rows, columns: 0.5 * max(1, rows / columns) ** 0.5, False),
    ),
    "experts": (
        "--muon-num-ns-steps 4 --muon-scale-mode unit_rms_norm",
        2,
        (0.9, False, QUINTIC[:4], lambda rows, columns: (rows / columns) ** 0.5, True),
    ),
}
TP2, PP2, EP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "pipeline-model", "expert-model"))
SP, CP2 = "--sequence-parallel", "--context-parallel-size 2 --cp-comm-type allgather"
SHARDED = "--use-distributed-optimizer"
DISTRIBUTED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
ONLY_HERE = "--muon-tp-mode distributed"


# Model and kind of run -> layout -> processes and flags, and whether it is one of the sample that is always tried.
LAYOUTS = {
    ("separate", "plain"): {
        "tp2-sp": (2, f"{TP2} {SP}", True),
        "tp2-distributed": (2, f"{TP2} {ONLY_HERE}", True),
        "dp2-sharded": (2, f"{DISTRIBUTED} {{save}}", True),
        "dp2-sharded-alone": (2, SHARDED, False),
        "dp2": (2, "", False),
        "pp2": (2, f"{PP2} --pre-buffer-pipeline-stages 1", False),
        "cp2": (2, CP2, False),
        "pp2-vp2-sharded": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2 {DISTRIBUTED}", False),
        "cp2-dp2-sharded": (4, f"{CP2} {DISTRIBUTED}", False),
        "tp2-dp2-sharded": (4, f"{TP2} {SP} {DISTRIBUTED}", False),
    },
    ("in-head", "plain"): {
        "tp2-sp-distributed": (2, f"{TP2} {SP} {ONLY_HERE}", False),
        "dp2-sharded": (2, DISTRIBUTED, False),
    },
    ("experts", "plain"): {
        "ep2-sharded": (2, f"{EP2} {DISTRIBUTED}", True),
        "ep2": (2, EP2, False),
        "tp2-sp": (2, f"{TP2} {SP}", False),
        "ep2-tp2-sharded": (4, f"{EP2} {TP2} {SP} {DISTRIBUTED}", False),
    },
    ("separate", "stage-1"): {
        "pp2-sharded": (2, f"{PP2} --pre-buffer-pipeline-stages 1 {DISTRIBUTED}", True),
        "tp2-sp": (2, f"{TP2} {SP}", False),
        "tp2-dp2-sharded": (4, f"{TP2} {SP} {DISTRIBUTED}", False),
    },
}
CASES = [
    pytest.param(*kind, name, marks=() if sample else pytest.mark.thorough)
    for kind, layouts in LAYOUTS.items()
    for name, (_, _, sample) in layouts.items()
]
KINDS = {"plain": "", "stage-1": "--training-stage 1"}
# Next stage: momentum and moments stay, a gradient of at most 1e-3 is added to them with a weight of 1e-6.
STILL = (
    "--lr 1e-12 --min-lr 1e-12 --weight-decay 0 --clip-grad 1e-3 --muon-momentum 0.999999 --adam-beta1 0.999999 "
    "--adam-beta2 0.999999"
)


class Room:
    """The models, their packs, and what runs from them leave."""

    def __init__(self, directory: Path, packs: Path) -> None:
        self.directory, self.packs = directory, packs
        self.models = {}
        for name, sizes in SIZES.items():
            (directory / name).mkdir()
            self.models[name] = write_random_model(directory / name, sizes)

    def job(self, name: str, model: str = "separate", flags: str = "", steps: int | None = None) -> Job:
        """A run, whose flags may say ``{save}`` to keep a checkpoint of each step."""
        settings, usual, _ = SETTINGS[model]
        flags = f"{MUON} {settings} {flags}".format(save=f"--save-interval 1 --save {self.directory}/{name}/saved")
        return layout_job(self.directory / name, self.models[model], self.packs, flags, steps or usual)

    def layouts(self, sampled: bool) -> dict[int, list[Job]]:
        """The runs of the sample, or all others, by their number of processes."""
        jobs: dict[int, list[Job]] = {}
        for (model, kind), layouts in LAYOUTS.items():
            for name, (processes, flags, always) in layouts.items():
                if always == sampled:
                    job = self.job(f"{model}-{kind}-{name}", model, f"{KINDS[kind]} {flags}")
                    jobs.setdefault(processes, []).append(job)
        return jobs

    def one(self, model: str, kind: str = "plain", steps: int | None = None) -> str:
        """The name of a run on one process."""
        return f"{model}-{kind}-{steps or SETTINGS[model][1]}"

    def saved(self, name: str, step: int) -> TorchDistDirectory:
        return TorchDistDirectory(self.directory / name / "saved" / f"iter_{step:07d}")


@pytest.fixture(scope="module")
def runs(room, tmp_path_factory) -> Room:
    """One process: a run of each length for each model. Two: the sample of layouts, resumed runs and the next stage."""
    runs = Room(tmp_path_factory.mktemp("muon"), room / "packs")
    lengths = [(model, steps) for model, (_, longest, _) in SETTINGS.items() for steps in range(1, longest + 1)]
    alone = [runs.job(runs.one(model, steps=steps), model, "{save}", steps) for model, steps in lengths]
    adam = ["--lr", "1e-4", "--optimizer", "adam", "--save", runs.directory / "adam" / "saved"]
    alone += [
        runs.job("half-rates", flags="--lr-scale post_llm=0.5 {save}", steps=1),
        runs.job(runs.one("separate", "stage-1"), flags="--training-stage 1 {save}"),
        layout_job(runs.directory / "adam", runs.models["separate"], runs.packs, " ".join(map(str, adam)), 1),
        runs.job("from-adam", flags=handed_over(runs, "adam"), steps=1),
        runs.job("bf16-one", flags="--bf16"),
    ]
    run_jobs(1, alone)
    resumed = f"--ckpt-step 1 --load {runs.directory}"
    (sample,) = runs.layouts(sampled=True).values()
    two = [
        *sample,
        runs.job("one-to-sharded", flags=f"{resumed}/{runs.one('separate')}/saved {DISTRIBUTED}"),
        runs.job("sharded-to-tp2", flags=f"{resumed}/separate-plain-dp2-sharded/saved {TP2}"),
        runs.job(
            "next",
            flags=f"{handed_over(runs, runs.one('separate', 'stage-1'))} {STILL} {DISTRIBUTED} {{save}}",
            steps=1,
        ),
        runs.job("bf16-sharded", flags=f"--bf16 {DISTRIBUTED}"),
    ]
    run_jobs(2, two)
    return runs


def handed_over(runs: Room, name: str) -> str:
    return f"--pretrained-checkpoint {runs.directory}/{name}/saved --pretrained-optimizer"


@pytest.fixture(scope="module")
def further(runs) -> Room:
    """The layouts that are not in the sample."""
    for processes, jobs in runs.layouts(sampled=False).items():
        run_jobs(processes, jobs)
    return runs


@cache
def start_of(runs: Room, model: str) -> TorchDistDirectory:
    return TorchDistDirectory(runs.models[model] / "megatron")


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon updates it; experts are stored as one tensor."""
    return tensor.ndim >= 2 and name not in ("embedding.word_embeddings.weight", "output_layer.weight")


def orthogonalized(name: str, momentum: Tensor, sizes: NeoSizes, settings: tuple) -> Tensor:
    """Muon's direction (K. Jordan, https://kellerjordan.github.io/posts/muon): Newton-Schulz, times a scale."""
    _, _, coefficients, scale, split = settings
    if momentum.ndim == 3:  # of experts
        return torch.stack([orthogonalized(name, one, sizes, settings) for one in momentum])
    if split and ("linear_qkv" in name or "linear_qk_hw" in name):
        groups, heads = sizes.num_query_groups, sizes.num_attention_heads // sizes.num_query_groups
        by_head = momentum.unflatten(0, (groups, -1, sizes.head_dim))
        parts = by_head.split([heads, *[1] * (by_head.shape[1] - heads)], dim=1)
        unsplit = (*settings[:-1], False)
        return torch.cat(
            [orthogonalized(name, p.flatten(0, 2), sizes, unsplit).unflatten(0, p.shape[:3]) for p in parts], dim=1
        ).flatten(0, 2)
    x = momentum / momentum.norm().clamp(min=1e-7)  # an expert may have no token
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * scale(*momentum.shape)


def reference(weights: dict[str, Tensor], steps: list[dict[str, Tensor]], sizes: NeoSizes, settings: tuple) -> None:
    """Updates float64 weights by the gradients of each step: Muon where `is_matrix`, else AdamW."""
    momentum, nesterov = settings[:2]
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step, gradients in enumerate(steps, 1):
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        for name, weight in weights.items():
            gradient = gradients[name] * min(1.0, 1.0 / norm)
            if weight.ndim > 1:
                weight.mul_(1 - RATE * DECAY)
            if is_matrix(name, weight):
                first[name] = momentum * first[name] + gradient
                direction = gradient + momentum * first[name] if nesterov else first[name]
                weight.sub_(RATE * orthogonalized(name, direction, sizes, settings))
            else:
                first[name].lerp_(gradient, 1 - BETAS[0])
                second[name].lerp_(gradient.square(), 1 - BETAS[1])
                mean, square = first[name] / (1 - BETAS[0] ** step), second[name] / (1 - BETAS[1] ** step)
                weight.sub_(RATE * mean / (square.sqrt() + EPS))


@pytest.mark.parametrize("model", SIZES)
def test_steps_are_those_of_the_published_formula(runs, model):
    sizes, start, (_, steps, settings) = SIZES[model], start_of(runs, model), SETTINGS[model]
    weights = {row.megatron: start.read(row.megatron).double() for row in tensor_table(sizes)}
    before = {name: weight.clone() for name, weight in weights.items()}
    gradients = [runs.job(runs.one(model, steps=n), model).read_gradients() for n in range(1, steps + 1)]
    reference(weights, [{name: g.double() for name, g in one.items()} for one in gradients], sizes, settings)
    saved = runs.saved(runs.one(model), steps)
    for name, weight in weights.items():
        change, expected = saved.read(name).double() - before[name], weight - before[name]
        error, size = (change - expected).norm(), expected.norm()
        assert error <= 1e-3 * size, f"{name}: error {error:.2e} of {size:.2e}"


@pytest.mark.parametrize(("model", "kind", "layout"), CASES)
def test_layouts_agree(request, runs, model, kind, layout):
    if not LAYOUTS[model, kind][layout][-1]:
        request.getfixturevalue("further")
    one, other = runs.job(runs.one(model, kind)), runs.job(f"{model}-{kind}-{layout}")
    assert_same(SIZES[model], other, one, loss=2e-6, gradient=1e-5)
    norms, expected = other.scalars("grad-norm"), one.scalars("grad-norm")
    assert norms == {step: pytest.approx(values, rel=1e-5) for step, values in expected.items()}


def test_in_bfloat16_matrices_are_sharded_with_their_masters(runs):
    one, sharded = (runs.job(f"bf16-{name}").scalars("lm loss") for name in ("one", "sharded"))
    assert sharded == {step: pytest.approx(values, abs=2e-3) for step, values in one.items()}
    assert one[3][0] < one[1][0] - 0.1


@pytest.mark.parametrize("name", ["one-to-sharded", "sharded-to-tp2"])
def test_a_run_goes_on_on_another_layout(runs, name):
    expected, actual = (runs.job(run).scalars("lm loss") for run in (runs.one("separate"), name))
    assert actual == {step: pytest.approx(expected[step], abs=2e-6, rel=0) for step in (2, 3)}


def test_the_next_stage_takes_over_momentum_and_moments(runs):
    first, second = runs.saved(runs.one("separate", "stage-1"), 3), runs.saved("next", 1)
    table = {row.megatron: row for row in tensor_table(SMALL)}
    kinds = {name: ["exp_avg", "exp_avg_sq"] for name in table}
    kinds |= {name: ["momentum_buffer"] for name in table if is_matrix(name, second.read(name))}
    moments = {f"optimizer.state.{kind}.{name}" for name, of_name in kinds.items() for kind in of_name}
    assert {key for key in second.shapes if key.startswith("optimizer.") and ".param." not in key} == moments
    for name, row in table.items():
        for kind in kinds[name]:
            after = second.read(f"optimizer.state.{kind}.{name}")
            if row.trained_in_stage_1:
                before = first.read(f"optimizer.state.{kind}.{name}")
                assert 0 < (after - before).norm() <= 2e-5 * before.norm(), (kind, name)
            else:
                assert after.norm() <= 1.01e-9, (kind, name)
    trained = sum(row.trained_in_stage_1 for row in table.values())
    sentence = f"taken over for {trained} parameters, zero for {len(table) - trained} that"
    assert sentence in runs.job("next").printed()


def test_state_of_another_optimizer_is_refused(runs):
    sentence = runs.job("from-adam").exit()
    assert "holds the state of --optimizer adam, and this run has muon: choose --optimizer adam, or leave" in sentence


def test_a_module_moves_by_its_scaled_rate(runs):
    start, full, half = (
        start_of(runs, "separate"),
        runs.saved(runs.one("separate", steps=1), 1),
        runs.saved("half-rates", 1),
    )
    for row in tensor_table(SMALL):
        before = start.read(row.megatron)
        change, scaled = full.read(row.megatron) - before, half.read(row.megatron) - before
        factor = 0.5 if row.layer is not None and row.layer >= SMALL.pre_buffer_layers else 1.0
        assert (scaled - factor * change).norm() <= 1e-3 * change.norm(), row.megatron
