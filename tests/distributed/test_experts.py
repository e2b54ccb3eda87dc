"""A mixture of experts trains alike on every layout, with its balance losses; and ends with what it began with.

Losses within 2e-6 and the last gradients, each complete tensor, within 1e-5 relative of the run on one process.
In bfloat16, products are rounded as in `test_layouts.py` (losses 2e-3, gradients 5e-2), and rounding turns choices: of
eight router logits the second and the third are within 2**-9 of their spread for half a percent of the tokens. These
move their losses by tenths, the mean by up to 3e-3. One of them can be a tenth of a small tensor's gradient, so that
gradients are compared as one vector.
"""

import re
from pathlib import Path

import pytest
import torch
from support.layout_runs import EXPERTS, assert_same, layout_job, write_random_model
from support.pretrain_jobs import Job, run_jobs

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2, CP2, EP2 = (f"--{kind}-parallel-size 2" for kind in ("pipeline-model", "context", "expert-model"))
UNSPLIT = "--expert-tensor-parallel-size 1"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EVALUATION = "--valid-data-path {packs} --eval-interval 3 --eval-iters 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn moe"
OWN = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1"

# Kind -> layout -> processes and flags; the first of a kind is compared with. The balance loss is that of the packs
# that all ranks read at once, so that there are four of them in each.
LAYOUTS = {
    "plain": {
        "one": (1, EVALUATION),
        "tp2": (2, TP2),
        "pp2-selective": (2, f"{PP2} --pre-buffer-pipeline-stages 1 {SELECTIVE}"),
        "cp2-allgather": (2, f"{CP2} --cp-comm-type allgather"),
        "ep2": (2, EP2),
        "ep2-allgather": (2, f"{EP2} --moe-token-dispatcher-type allgather"),
        "ep2-distributed": (2, f"{EP2} {DISTRIBUTED}"),
        "ep4": (4, "--expert-model-parallel-size 4"),
        "ep2-tp2": (4, f"{EP2} {TP2}"),
        "ep4-tp2-unsplit": (4, f"{TP2} {UNSPLIT} --expert-model-parallel-size 4"),
        "ep2-pp2-vp2": (4, f"{EP2} {PP2} --num-virtual-stages-per-pipeline-rank 2 {EVALUATION}"),
        "ep2-cp2-a2a-full": (4, f"{EP2} {CP2} --cp-comm-type a2a {FULL}"),
    },
    "balance": {
        "one": (1, "--micro-batch-size 4"),
        "ep2": (2, f"{EP2} --micro-batch-size 2"),
        "cp2": (2, f"{CP2} --micro-batch-size 4"),
        "pp2": (2, f"{PP2} --micro-batch-size 4"),
        "ep2-dp2": (4, EP2),
        "ep2-tp2-full": (4, f"{EP2} {TP2} {FULL} --micro-batch-size 2"),
    },
    "own": {
        "one": (1, ""),
        "ep2": (2, EP2),
        "ep2-tp2": (4, f"{EP2} {TP2}"),
    },
    "stage-1": {
        "one": (1, ""),
        "tp2": (2, TP2),
        "ep2-pp2-distributed": (4, f"{EP2} {PP2} {DISTRIBUTED}"),
    },
    "bfloat16": {
        "one": (1, ""),
        "tp2": (2, TP2),
        "ep2-distributed": (2, f"{EP2} {DISTRIBUTED}"),
    },
}
LOSSES = {
    "plain": "",
    "balance": "--balance-loss-coeff 0.5",
    "own": OWN,
    "stage-1": "--training-stage 1",
    "bfloat16": "--bf16",
}
# Their parts are in others too.
THOROUGH = [("plain", "ep2-allgather"), ("plain", "ep4"), ("plain", "ep2-cp2-a2a-full"), ("balance", "ep2-dp2")]
THOROUGH += [("own", "ep2-tp2")]
CASES = [(kind, name) for kind, layouts in LAYOUTS.items() for name in layouts if name != "one" and kind != "bfloat16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), EXPERTS)


def run_layouts(directory: Path, model: Path, packs: Path, cases: list[tuple[str, str]]) -> dict[str, Job]:
    """In one launch for each number of processes."""
    by_processes: dict[int, list[Job]] = {1: [], 2: [], 4: []}
    for kind, name in cases:
        processes, flags = LAYOUTS[kind][name]
        flags = f"{LOSSES[kind]} {flags}".format(packs=packs)
        steps = 2 if kind == "bfloat16" else 3
        job = layout_job(directory / f"{kind}-{name}", model, packs, flags, iterations=steps)
        by_processes[processes].append(job)
    for processes, jobs in by_processes.items():
        if jobs:
            run_jobs(processes, jobs)
    return {job.directory.name: job for jobs in by_processes.values() for job in jobs}


@pytest.fixture(scope="module")
def runs(room, model, tmp_path_factory) -> dict[str, Job]:
    """All runs but the thorough ones."""
    cases = [(kind, name) for kind, layouts in LAYOUTS.items() for name in layouts if (kind, name) not in THOROUGH]
    return run_layouts(tmp_path_factory.mktemp("experts"), model, room / "packs", cases)


@pytest.fixture(scope="module")
def more_runs(room, model, runs, tmp_path_factory) -> dict[str, Job]:
    return runs | run_layouts(tmp_path_factory.mktemp("more-experts"), model, room / "packs", THOROUGH)


@pytest.mark.parametrize(("kind", "layout"), [case for case in CASES if case not in THOROUGH])
def test_losses_and_gradients_of_three_steps(runs, kind, layout):
    assert_same(EXPERTS, runs[f"{kind}-{layout}"], runs[f"{kind}-one"], loss=2e-6, gradient=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "layout"), THOROUGH)
def test_more_layouts(more_runs, kind, layout):
    assert_same(EXPERTS, more_runs[f"{kind}-{layout}"], more_runs[f"{kind}-one"], loss=2e-6, gradient=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS["bfloat16"] if name != "one"])
def test_bfloat16(runs, layout):
    one, other = runs["bfloat16-one"], runs[f"bfloat16-{layout}"]
    losses, gradients = other.scalars("lm loss"), other.read_gradients()
    for step, values in one.scalars("lm loss").items():
        assert losses[step] == pytest.approx(values, abs=5e-3, rel=0)
    expected = one.read_gradients()
    error, size = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([gradients[name] - value for name, value in expected.items()], expected.values())
    )
    assert error <= 5e-2 * size


def test_evaluation(runs):
    expected, actual = (runs[f"plain-{name}"].scalars("lm loss validation") for name in ("one", "ep2-pp2-vp2"))
    assert len(expected[3]) == 1
    assert actual[3] == pytest.approx(expected[3], abs=2e-6, rel=0)


@pytest.mark.parametrize("layout", ["ep2", "pp2", "ep2-tp2-full"])
def test_figures_of_routers_are_logged(runs, layout):
    """Of every layer and modality, and the same however ranks share the work."""
    actual, expected = (runs[f"balance-{name}"].every_scalar() for name in (layout, "one"))
    for figure in ("load imbalance", "router entropy", "dead experts", "balance loss"):
        for modality in ("text", "image"):
            for tag in (f"experts/{figure}/{modality}", f"experts/{figure}/{modality} layer 03"):
                for step, values in expected[tag].items():
                    assert actual[tag][step] == pytest.approx(values, rel=1e-4, abs=1e-6), tag
    entropy = expected["experts/router entropy/image layer 00"]
    assert len(entropy) == 3 and all(0 < value <= 1 for (value,) in entropy.values())
    loss = expected["experts/balance loss/text"]
    assert all(value >= EXPERTS.num_layers for (value,) in loss.values()), "1 a layer where the load is even"
    assert re.search(r"\| expert load imbalance: text \d\.\d\d, image \d\.\d\d \|", runs["balance-one"].printed())


def test_balance_losses_act_on_routers(runs):
    """Else the layouts above would be alike without them."""
    router = "decoder.layers.3.mlp.router.weight"
    plain, balance, own = (runs[f"{kind}-one"].read_gradients()[router] for kind in ("plain", "balance", "own"))
    for changed in (balance, own):
        assert (changed - plain).norm() > 0.1 * plain.norm()
