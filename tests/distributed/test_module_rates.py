"""`--lr-scale` and `--unfreeze`: what each module moves by in a step, on any layout and after a resume.

The first update of AdamW without weight decay is the learning rate, in the direction of each gradient's sign. So a
checkpoint before and one after a module's first step show its rate, whatever the model.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from support.golden_packs import make_packs
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory

RATE = 1e-4
LAYOUTS = {
    "plain": "",
    "distributed": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
}
SCALED = "--lr-scale patch_embedding=2,post_llm=0.5,post_llm.mlp.linear_fc2=3"
LATE = f"--training-stage 1 --unfreeze post_llm@2 {SCALED}"
# Module -> its part of the learning rate.
EXPECTED = {
    "patch_embedding.": 2.0,
    "decoder.pre_buffer": 1.0,
    "decoder.post_llm.mlp.linear_fc1": 0.5,
    "decoder.post_llm.mlp.linear_fc2": 3.0,
    "decoder.post_llm.self_attention": 0.5,
}
MISTAKES = {
    "no-such-module": ("--lr-scale post_llm.mpl=2", "--lr-scale post_llm.mpl: the model has no parameter of this name"),
    "trained": ("--training-stage 1 --unfreeze post_llm.self_attention.q_layernorm_w@2", "has no frozen parameter"),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("module-rates")
    make_packs(room, repeats=8, seq_length=192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    jobs = [run(room, name, f"{LATE} --train-iters 4 {flags}") for name, flags in LAYOUTS.items()]
    jobs.append(run(room, "stage-1", "--training-stage 1 --train-iters 4"))
    jobs.append(run(room, "early", f"--training-stage 2 --train-iters 1 {SCALED} --save-interval 1"))
    for name, (flags, _) in MISTAKES.items():
        jobs.append(run(room, name, f"{flags} --train-iters 4"))
    again = f"{LATE} --train-iters 4 --ckpt-step 2 --load {room}/plain/saved"
    jobs += [
        run(room, "again", again),
        run(room, "again-distributed", f"{again} {LAYOUTS['distributed']}"),
        run(room, "changed", again.replace("post_llm@2", "post_llm@3")),
    ]
    run_jobs(2, jobs)
    return room


def run(room: Path, name: str, flags: str) -> Job:
    """Later flags win."""
    return Job(
        room / name,
        [
            *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs"),
            *("--pretrained-checkpoint", f"{room}/golden", "--save", f"{room}/{name}/saved", "--save-interval", "1"),
            *("--micro-batch-size", "1", "--global-batch-size", "4", "--num-workers", "0", "--log-interval", "1"),
            *("--lr", str(RATE), "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--weight-decay", "0"),
            *flags.split(),
        ],
    )


@cache
def weights(room: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """Weights after a step, by the name of their tensor with the part of the model in place of a layer's number."""
    saved = (
        TorchDistDirectory(room / name / "saved" / f"iter_{step:07d}") if step else TorchDistDirectory(room / "golden")
    )
    return {key: saved.read(key) for key in saved.shapes if not key.startswith("optimizer.")}


def module(key: str) -> str:
    """The name that a user gives, as a start prints it, with `decoder.` before that of a layer."""
    if not key.startswith("decoder.layers."):
        return key
    _, _, number, rest = key.split(".", 3)
    return f"decoder.{'pre_buffer' if int(number) < 2 else 'post_llm'}.{rest}"


def moved(room: Path, name: str, start: int, end: int) -> dict[str, float]:
    """The median change of a number of each tensor, in learning rates."""
    before, after = weights(room, name, start), weights(room, name, end)
    return {key: ((after[key] - before[key]).abs().median() / RATE).item() for key in before}


@cache
def frozen_in_stage_1(room: Path) -> set[str]:
    return {key for key, change in moved(room, "stage-1", 0, 4).items() if change == 0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_moves_by_its_own_rate_from_its_step_on(room, layout):
    late = {key for key in frozen_in_stage_1(room) if module(key).startswith("decoder.post_llm")}
    assert len(late) > 10
    first, until, third = moved(room, layout, 0, 1), moved(room, layout, 0, 2), moved(room, layout, 2, 3)
    for key, change in first.items():
        factor = next((factor for name, factor in EXPECTED.items() if module(key).startswith(name)), None)
        if key in frozen_in_stage_1(room):
            assert until[key] == 0, key
            assert third[key] == (pytest.approx(factor, rel=2e-2) if key in late else 0), key
        else:
            assert change == pytest.approx(factor, rel=2e-2), key


def test_modules_that_train_from_the_start_move_by_their_own_rates_too(room):
    for key, change in moved(room, "early", 0, 1).items():
        factor = next((factor for name, factor in EXPECTED.items() if module(key).startswith(name)), 1.0)
        if key != "embedding.word_embeddings.weight":  # most rows of which are not read
            assert change == pytest.approx(factor, rel=2e-2), key


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_layouts_agree(room, layout):
    plain, other = (Job(room / name, []).scalars("lm loss") for name in ("plain", layout))
    assert len(plain) == 4
    for step, (loss,) in plain.items():
        assert other[step] == [pytest.approx(loss, rel=2e-6)], step


def test_frozen_gradients_count_in_no_norm(room):
    """Before their step, runs with and without them are the same; the scales differ from the first update on."""
    ours, theirs = (Job(room / name, []).scalars("grad-norm") for name in ("plain", "stage-1"))
    assert ours[1] == theirs[1]
    assert ours[3][0] > 1.05 * theirs[3][0]


@pytest.mark.parametrize("name", ["again", "again-distributed"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(room, name):
    through, again = (Job(room / run, []).scalars("lm loss") for run in ("plain", name))
    assert set(again) == {3, 4}
    for step in again:
        assert again[step] == [pytest.approx(through[step][0], rel=2e-6)]
    expected, actual = weights(room, "plain", 4), weights(room, name, 4)
    for key, weight in expected.items():
        torch.testing.assert_close(actual[key], weight, atol=2e-6, rtol=1e-5, msg=key)


def test_a_changed_plan_is_refused(room):
    assert "is of a run with --unfreeze 'post_llm@2', not 'post_llm@3'" in Job(room / "changed", []).exit()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_name_without_parameters_is_refused(room, name):
    assert MISTAKES[name][1] in Job(room / name, []).exit()


def test_scaled_rates_are_logged(room):
    scalars = Job(room / "plain", []).every_scalar()
    assert scalars["learning-rate"][1] == [pytest.approx(RATE)]
    assert scalars["learning-rate/patch_embedding"][1] == [pytest.approx(2 * RATE)]
    assert scalars["learning-rate/post_llm"][1] == [pytest.approx(RATE / 2)]
