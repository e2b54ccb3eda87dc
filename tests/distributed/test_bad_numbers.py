"""A loss or gradient that is not a finite number ends a run before the weights change, and the run can go on."""

import math
from pathlib import Path

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
    ]
    two = [
        job("dp2", dp2, saved="dp2-saved", pack=LATER),
        job("dp2-on", f"{dp2} {skip}", saved="dp2-saved", pack=LATER),
        job("pp2-first", f"{pp2} --num-virtual-stages-per-pipeline-rank 2", pack=FIRST),
        job("pp2", f"{pp2} --num-virtual-stages-per-pipeline-rank 2 {skip}"),
        job("tp2", f"--tensor-model-parallel-size 2 {skip}"),
    ]
    run_jobs(1, one)
    run_jobs(2, two)
    return {run.directory.name: run for run in (*one, *two)}


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
