"""The checkpoint of stage 1 starts stage 2 with the optimizer's state of what was trained, on any layout."""

import json
from pathlib import Path

import pytest
import torch
from support.layout_runs import EXPERTS, IN_HEAD, write_random_model
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.run.optimizer_state import saved_optimizers

DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
TP2, PP2 = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
# Stage 1 with each way of keeping the optimizer's state, and of the other variants; stage 2 from all, on other layouts
# too.
EP2 = f"--expert-model-parallel-size 2 {DISTRIBUTED}"
FIRST = {"plain": "", "distributed-bf16": f"{DISTRIBUTED} --bf16", "in-head": "", "experts": EP2}
SECOND = {
    "plain": ("plain", ""),
    "pp2": ("plain", PP2),  # five layers: Megatron alone would refuse
    "distributed-bf16": ("distributed-bf16", f"{DISTRIBUTED} --bf16"),
    "tp2-bf16": ("distributed-bf16", f"{TP2} --bf16"),
    "in-head-tp2": ("in-head", TP2),
    "experts-tp2": ("experts", f"{TP2} {DISTRIBUTED}"),
}
# Stage 1 goes on on the same layout and on others.
RESUMED = {
    "in-head": {"same": "", "tp2": TP2, "pp2": PP2},
    "experts": {"same": EP2, "tp2": f"{TP2} {DISTRIBUTED}", "pp2": f"{PP2} {DISTRIBUTED}"},
}
# Stage 1 -> tensors of a pre-buffer layer, of a post-LLM layer that it trains, of such layers, outside of layers.
COUNTS = {
    "plain": (13, 5, 3, 3),
    "distributed-bf16": (13, 5, 3, 3),
    "in-head": (10, 6, 2, 3),
    "experts": (11, 6, 2, 3),
}
VARIANTS = {"in-head": IN_HEAD, "experts": EXPERTS}


def command(room: Path, first: str, *flags: str) -> list[str]:
    model = room / first / "megatron" if first in VARIANTS else GOLDEN / "ckpt_untied"
    return [
        *("--neo-model", f"{model}", "--train-data-path", f"{room}/packs"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--lr-warmup-iters", "0"),
        *("--num-workers", "0", "--log-interval", "1"),
        *flags,
    ]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Two steps of stage 1, then one of stage 2 that hardly moves what it starts from."""
    room = tmp_path_factory.mktemp("stages")
    (room / "annotations.json").write_text(
        json.dumps(json.loads((GOLDEN / "meta.json").read_text())["untied_pack1"]["docs"] * 8)
    )
    source = Source("golden", str(room / "annotations.json"), str(GOLDEN))
    preprocess([source], GOLDEN / "tokenizer", room / "shards", PreprocessConfig(min_pixels=4096, max_pixels=65536))
    write_packs([PackInput(str(room / "shards"))], room / "packs", 192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    for name, sizes in VARIANTS.items():
        (room / name).mkdir()
        write_random_model(room / name, sizes)
    still = "--lr 1e-12 --min-lr 1e-12 --weight-decay 0 --adam-beta1 0.999999 --adam-beta2 0.999999 --clip-grad 1e-3"
    jobs = []
    for name, flags in FIRST.items():
        begun = room / name / "megatron" if name in VARIANTS else room / "golden"
        start = ["--pretrained-checkpoint", f"{begun}", "--training-stage", "1", "--train-iters", "2"]
        save = ["--save", f"{room}/first/{name}/saved"]
        jobs.append(Job(room / "first" / name, command(room, name, *start, *save, *flags.split(), "--lr", "1e-3")))
    for name, (first, flags) in SECOND.items():
        start = ["--pretrained-checkpoint", f"{room}/first/{first}/saved", "--pretrained-optimizer"]
        stage = ["--training-stage", "2", "--train-iters", "1", "--save", f"{room}/second/{name}/saved", *still.split()]
        jobs.append(Job(room / "second" / name, command(room, first, *start, *stage, *flags.split())))
    resume = ["--load", f"{room}/first/plain/saved", "--training-stage", "2", "--train-iters", "4"]
    jobs.append(Job(room / "resumed", command(room, "plain", *resume)))
    longer = "--training-stage 1 --lr 1e-3 --train-iters 4 --override-opt-param-scheduler"
    for first, layouts in RESUMED.items():
        for name, flags in layouts.items():
            resume = ["--load", f"{room}/first/{first}/saved", *longer.split(), *flags.split()]
            jobs.append(Job(room / f"{first}-resumed" / name, command(room, first, *resume)))
    for name, flags in (("bf16", "--bf16"), ("distributed-bf16", f"{DISTRIBUTED} --bf16")):
        start = ["--pretrained-checkpoint", f"{room}/golden", "--training-stage", "2", "--train-iters", "1"]
        save = ["--save", f"{room}/from-float32/{name}/saved"]
        jobs.append(
            Job(room / "from-float32" / name, command(room, "plain", *start, *save, *still.split(), *flags.split()))
        )
    run_jobs(2, jobs)
    return room


def master(saved: TorchDistDirectory, parameter: str) -> torch.Tensor:
    """The float32 copy of a bf16 parameter; the distributed optimizer has a name of its own for it."""
    names = (f"optimizer.state.{kind}.{parameter}" for kind in ("fp32_param", "param"))
    return saved.read(next(name for name in names if name in saved.shapes))


@pytest.mark.parametrize("name", ["bf16", "distributed-bf16"])
def test_masters_are_the_weights_of_the_checkpoint_and_not_those_of_the_model(room, name):
    golden = TorchDistDirectory(room / "golden")
    after = TorchDistDirectory(room / "from-float32" / name / "saved")
    for parameter in golden.shapes:
        weight = golden.read(parameter)
        torch.testing.assert_close(master(after, parameter), weight, atol=1e-9, rtol=0)
        assert torch.equal(after.read(parameter), weight.to(torch.bfloat16))
    assert any((golden.read(parameter).bfloat16() != golden.read(parameter)).any() for parameter in golden.shapes)


def step(saved: TorchDistDirectory) -> int:
    states = saved_optimizers(saved.common_state())
    (count,) = {state.get("optimizer", state)["param_groups"][0]["step"] for state in states}
    return count


@pytest.mark.parametrize("name", SECOND)
def test_moments_and_masters_arrive(room, name):
    first = TorchDistDirectory(room / "first" / SECOND[name][0] / "saved")
    second = TorchDistDirectory(room / "second" / name / "saved")
    trained = {key.removeprefix("optimizer.state.exp_avg.") for key in first.shapes if ".exp_avg." in key}
    every = {key.removeprefix("optimizer.state.exp_avg.") for key in second.shapes if ".exp_avg." in key}
    # Saved is the state of what trains alone: 4 tensors of the patch embedding, all of a pre-buffer layer, some of a
    # post-LLM layer; and of every tensor in stage 2.
    of_layer, in_post_llm, layers, others = COUNTS[SECOND[name][0]]
    assert len(trained) == 4 + 2 * of_layer + layers * in_post_llm
    assert len(every) == 4 + (2 + layers) * of_layer + others
    for parameter in sorted(every):
        for kind, added in (("exp_avg", 1e-9), ("exp_avg_sq", 1e-12)):  # by a gradient of at most 1e-3
            key = f"optimizer.state.{kind}.{parameter}"
            after = second.read(key)
            if parameter in trained:
                before = first.read(key)
                assert 0 < (after - before).norm() <= 2e-5 * before.norm(), key
            else:
                assert after.norm() <= 1.01 * added, key
        if parameter in trained and "bf16" in name:
            torch.testing.assert_close(master(second, parameter), master(first, parameter), atol=1e-9, rtol=0)
    assert step(first) == 2 and step(second) == 3
    run = second.common_state()
    assert run["iteration"] == 1 and run["args"].consumed_train_samples == 4
    printed = Job(room / "second" / name, []).printed()
    if name not in ("pp2", "experts-tp2"):  # whose ranks have a part of the model each
        assert f"taken over for {len(trained)} parameters, zero for {len(every - trained)} that" in printed


def test_the_schedule_is_that_of_the_new_stage(room):
    rates = Job(room / "second" / "plain", []).scalars("learning-rate")
    assert rates[1] == [pytest.approx(1e-12)]


def test_a_run_cannot_go_on_in_another_stage(room):
    sentence = Job(room / "resumed", []).exit()
    assert (
        "is of --training-stage 1 and this run, which resumes from it, of 2: to begin a stage, give it as" in sentence
    )


@pytest.mark.parametrize(
    ("first", "layout"), [(first, name) for first, layouts in RESUMED.items() for name in layouts if name != "same"]
)
def test_a_neo_unify_goes_on_on_another_layout(room, first, layout):
    """With its moments: a step at a rate of 1e-3 moves the loss."""
    same, other = (Job(room / f"{first}-resumed" / name, []).scalars("lm loss") for name in ("same", layout))
    assert same.keys() == other.keys() == {3, 4}
    for step, values in same.items():
        assert other[step] == pytest.approx(values, abs=2e-6, rel=0)
