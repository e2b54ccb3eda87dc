"""A loss or gradient that is not a finite number ends a run before the weights change, and the run can go on."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.dataset import PackDataset

STEPS, PACKS = 5, 4  # packs of a step
FIRST, LATER = 1, 2 * PACKS + 1  # packs of steps 1 and 3
JUMPING, SAVED = 76, 70  # steps of a run with losses that jump, and of its checkpoint
WEIGHT = "decoder.final_layernorm.weight"


def command(room: Path, flags: str, saved: Path | None = None) -> list[str]:
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs", "--train-iters", str(STEPS)),
        *("--micro-batch-size", "1", "--global-batch-size", str(PACKS), "--lr", "1e-4", "--min-lr", "1e-5"),
        *("--lr-warmup-iters", "0", "--num-workers", "0", "--log-interval", "1"),
        *("--pretrained-checkpoint", f"{room}/golden"),
        *(("--save", str(saved), "--load", str(saved), "--save-interval", "100") if saved else ()),
        *flags.split(),
    ]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad-numbers")


@pytest.fixture(scope="module")
def spoilt_checkpoint(own) -> Path:
    """The golden model with a parameter that is not a number."""
    directory = own / "spoilt-hf"
    directory.mkdir()
    (directory / "config.json").write_text((GOLDEN / "ckpt_untied" / "config.json").read_text())
    tensors = load_file(GOLDEN / "ckpt_untied" / "model.safetensors")
    tensors["language_model.model.norm.weight"][0] = math.nan
    save_file(tensors, directory / "model.safetensors")
    convert_hf_to_megatron(directory, own / "spoilt-checkpoint")
    return own / "spoilt-checkpoint"


@pytest.fixture(scope="module")
def runs(room, own, spoilt_checkpoint) -> dict[str, Job]:
    def job(name: str, flags: str = "", saved: str = "", pack: int = 0, value: float = math.nan, times: int = 9) -> Job:
        spoilt = ([pack], value, times) if pack else None
        return Job(own / name, command(room, flags, own / saved if saved else None), spoilt=spoilt)

    skip = "--iterations-to-skip 3"
    dp2 = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    pp2 = "--pipeline-model-parallel-size 2"
    one = [
        job("clean", skip),
        job("first", saved="first-saved", pack=FIRST),
        job("infinite", pack=FIRST, value=math.inf),
        job("later", saved="saved", pack=LATER),
        job("again", saved="saved", pack=LATER),
        job("on", skip, saved="saved", pack=LATER),
        job("not-saved", pack=LATER),
        job("disabled", "--rerun-mode disabled", pack=FIRST),
        job("diverging", "--lr 1e30 --min-lr 1e30"),
        job("checkpoint", f"--pretrained-checkpoint {spoilt_checkpoint}"),
        job("transient", pack=FIRST, times=1),
        job("report", "--rerun-mode report_stats"),
        job("skipped", "--on-bad-loss skip", saved="skipped-saved", pack=LATER),
        job("skipped-at-once", "--on-bad-loss skip --rerun-mode disabled", pack=LATER),
        job("skipped-in-a-row", "--on-bad-loss skip --lr 1e30 --min-lr 1e30 --train-iters 14"),
    ]
    # The weights hardly change, so the loss of a pack is always the same; steps have two packs.
    still = f"--lr 1e-12 --min-lr 1e-12 --global-batch-size 2 --train-iters {JUMPING} --on-bad-loss skip --loss-jump 1"
    from_there = f"--load {own}/jumps-saved --ckpt-step {SAVED}"
    jumping = [
        job("packs", f"--lr 1e-12 --min-lr 1e-12 --global-batch-size 1 --train-iters {2 * JUMPING}"),
        job("jumps", f"{still} --exit-interval {SAVED} --save-interval {SAVED}", saved="jumps-saved"),
        job("jumps-on", still, saved="jumps-saved"),
        job("replayed", f"{still} --on-bad-loss stop {from_there}"),
    ]
    two = [
        job("dp2-jumps", f"{dp2} {still} {from_there}"),
        job("pp2-jumps", f"{pp2} {still} {from_there}"),
        job("dp2", dp2, saved="dp2-saved", pack=LATER),
        job("dp2-on", f"{dp2} {skip}", saved="dp2-saved", pack=LATER),
        job("dp2-skipped", f"{dp2} --on-bad-loss skip", pack=LATER),
        job("pp2-skipped", f"{pp2} --num-virtual-stages-per-pipeline-rank 2 --on-bad-loss skip", pack=LATER),
        job("tp2-skipped", "--tensor-model-parallel-size 2 --on-bad-loss skip", pack=LATER),
        job("pp2-first", f"{pp2} --num-virtual-stages-per-pipeline-rank 2", pack=FIRST),
        job("pp2", f"{pp2} --num-virtual-stages-per-pipeline-rank 2 {skip}"),
        job("tp2", f"--tensor-model-parallel-size 2 {skip}"),
    ]
    run_jobs(1, [*one, *jumping])
    run_jobs(2, two)
    return {run.directory.name: run for run in (*one, *jumping, *two)}


@pytest.mark.parametrize(
    ("name", "step", "pack"),
    [
        *(("first", 1, FIRST), ("infinite", 1, FIRST), ("later", 3, LATER), ("again", 3, LATER)),
        *(("not-saved", 3, LATER), ("disabled", 1, FIRST), ("dp2", 3, LATER), ("pp2-first", 1, FIRST)),
    ],
)
def test_the_sentence_names_the_step_the_pack_and_how_to_go_on(runs, name, step, pack):
    sentence = runs[name].exit()
    assert sentence.startswith(f"pretrain_neo: step {step}: the loss is NaN or infinite"), sentence
    assert f"; it comes from pack {pack} (" in sentence and "annotations.json record" in sentence
    assert f"--iterations-to-skip {step} to leave out the packs of this step" in sentence and "\n" not in sentence
    assert ("and again when the step was computed a second time" in sentence) == (name != "disabled")


def test_the_records_are_those_of_the_pack(room, runs):
    """All four packs of a step that diverged."""
    sentence = runs["diverging"].exit()
    data = PackDataset(room / "packs", None, seed=1234)
    for number in range(PACKS, 2 * PACKS):
        numbers = ", ".join(str(record) for _, record in data.describe(number))
        assert f"pack {number} ({room}/annotations.json records {numbers})" in sentence


def test_what_the_step_before_left_is_saved_once(room, own, runs):
    assert not list((own / "first-saved").glob("iter_*")), "nothing was trained"
    assert "and were saved in" not in runs["first"].exit() + runs["again"].exit() + runs["not-saved"].exit()
    for name, saved in (("later", "saved"), ("dp2", "dp2-saved")):
        assert f"the weights are untouched and were saved in {own / saved}" in runs[name].exit()
        assert (own / saved / "iter_0000002").is_dir()
        assert torch.isfinite(TorchDistDirectory(own / saved / "iter_0000002").read(WEIGHT)).all()


@pytest.mark.parametrize("name", ["on", "dp2-on", "pp2", "tp2"])
def test_the_run_goes_on_without_the_step(runs, name):
    """With the losses of a run that left it out at once, in which no pack was bad."""
    expected, actual = runs["clean"].scalars("lm loss"), runs[name].scalars("lm loss")
    assert runs[name].exit() is None and list(expected) == [1, 2, 4, 5]
    assert list(actual) == ([4, 5] if "on" in name else [1, 2, 4, 5])
    for step, values in actual.items():
        assert values == pytest.approx(expected[step], rel=0 if name == "on" else 2e-6), step


@pytest.mark.parametrize("name", ["skipped", "skipped-at-once", "dp2-skipped", "pp2-skipped", "tp2-skipped"])
def test_a_skipped_step_changes_nothing(room, runs, name):
    """The run has the losses of one that left the step out, and names it."""
    expected, actual = runs["clean"].scalars("lm loss"), runs[name].scalars("lm loss")
    assert runs[name].exit() is None and list(actual) == [1, 2, 4, 5]
    for step, values in actual.items():
        assert values == pytest.approx(expected[step], rel=0 if name.startswith("skipped") else 2e-6), step
    (line,) = [line for line in runs[name].printed().splitlines() if "the step is skipped" in line]
    assert "step 3: the loss is NaN or infinite on rank" in line and f"; it comes from pack {LATER} (" in line
    assert f"neo-megatron inspect --packs {room}/packs --seed 1234 --pack N shows a pack" in line
    assert ("and again when the step was computed a second time" in line) == (name != "skipped-at-once")
    assert (
        runs[name].printed(len(list(runs[name].directory.glob("rank*.log"))) - 1).count("skipped iterations:   1") == 1
    )


def test_ten_steps_in_a_row_are_skipped(runs):
    run = runs["skipped-in-a-row"]
    assert run.printed().count("the step is skipped") == 10
    assert run.exit().startswith("pretrain_neo: step 12: ") and "10 steps in a row were skipped before" in run.exit()


@pytest.fixture(scope="module")
def jumps(room, runs) -> dict[int, tuple[float, int]]:
    """Steps that jump, with their losses and the pack with the highest one, by a count over the packs."""
    data = PackDataset(room / "packs", 1000, seed=1234)
    of_packs = [values[0] for _, values in sorted(runs["packs"].scalars("lm loss").items())]
    recent: list[float] = []
    found = {}
    for step in range(1, JUMPING + 1):
        packs = [2 * step - 2, 2 * step - 1]
        weights = [data[pack]["target_weight"].sum().item() for pack in packs]
        loss = float(np.average([of_packs[pack] for pack in packs], weights=weights))
        if len(recent) >= 64 and loss > np.mean(recent[-128:]) + np.std(recent[-128:]):
            found[step] = loss, max(packs, key=of_packs.__getitem__)
        else:
            recent.append(loss)
    return found


def test_steps_whose_loss_jumps_are_skipped(runs, jumps):
    """Also in a run that resumes, which has read few losses itself."""
    assert min(jumps) <= SAVED < max(jumps) and len(jumps) < JUMPING - 64
    for name in ("jumps", "jumps-on", "dp2-jumps", "pp2-jumps"):
        steps = range(1, SAVED + 1) if name == "jumps" else range(SAVED + 1, JUMPING + 1)
        assert list(runs[name].scalars("lm loss")) == [step for step in steps if step not in jumps], name
        lines = [line for line in runs[name].printed().splitlines() if "the step is skipped" in line]
        for line, step in zip(lines, [step for step in jumps if step in steps], strict=True):
            loss, pack = jumps[step]
            assert f"step {step}: the loss jumps to {loss:.4g}, more than 1 standard deviations above the" in line
            assert f"; most of it comes from pack {pack} (" in line and "again when the step was computed" in line


def test_a_jump_is_replayed_from_the_checkpoint_before(runs, jumps):
    step = min(step for step in jumps if step > SAVED)
    loss, pack = jumps[step]
    assert f"pretrain_neo: step {step}: the loss jumps to {loss:.4g}" in runs["replayed"].exit()
    assert f"; most of it comes from pack {pack} (" in runs["replayed"].exit()


def test_a_spoilt_checkpoint_is_not_blamed_on_the_packs(runs):
    sentence = runs["checkpoint"].exit()
    assert sentence.startswith("pretrain_neo: step 1: ") and f"the parameter {WEIGHT} itself is not finite" in sentence
    assert "--ckpt-step" in sentence and "--iterations-to-skip" not in sentence


def test_gradients_are_looked_at_once_in_a_step(runs):
    """By their norm; Megatron's look at every bucket, within the backward, is for the second computation alone."""
    assert all(runs[name].passes()["checks"] == 0 for name in ("clean", "pp2", "disabled"))
    assert runs["first"].passes()["checks"] > 0


def test_a_machine_that_computes_another_number_is_suspect(runs):
    """As if, for it is the pack that is another one when it is read again."""
    assert "and not when the step was computed a second time" in runs["transient"].exit()
    assert "the machine is suspect" in runs["transient"].exit()


def test_a_mode_that_cannot_start_is_refused(runs):
    assert "--rerun-mode report_stats" in runs["report"].exit()
