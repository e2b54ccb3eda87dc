"""Twenty steps as a user starts them, in bf16 and FP8, and a run that is taken up again."""

from pathlib import Path

import pytest
from conftest import GOLDEN
from pretrain_jobs import Job, run_jobs

STEPS, HALF = 20, 10


def command(packs: Path, *flags: str) -> list[str]:
    """The golden model's vocabulary with features that all FP8 recipes take."""
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--hidden-size", "256", "--ffn-hidden-size", "512"),
        *("--kv-channels", "64", "--patch-embedding-size", "128", "--train-data-path", f"{packs}"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", f"{STEPS}"),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", "2"),
        *("--num-workers", "1", "--log-interval", "1"),
        *("--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        *flags,
    ]


def fp8(recipe: str) -> list[str]:
    return ["--fp8-format", "hybrid", "--fp8-recipe", recipe, "--fp8-param-gather"]


def losses(job: Job) -> list[float]:
    """Of every step; a run that was taken up again has the later ones."""
    by_step = job.scalars("lm loss")
    return [by_step[step][0] for step in sorted(by_step)]


@pytest.fixture(scope="module")
def bf16(transformer_engine, packs, visible, tmp_path_factory) -> tuple[Job, Job]:
    """A run of all steps; and one that saved halfway and another that went on from there."""
    room = tmp_path_factory.mktemp("bf16")
    return trained_and_resumed(room, packs, [], visible)


def trained_and_resumed(room: Path, packs: Path, flags: list[str], visible: dict[str, str]) -> tuple[Job, Job]:
    whole = Job(room / "whole", command(packs, *flags))
    save = ["--save", f"{room}/saved", "--load", f"{room}/saved", "--save-interval", f"{HALF}"]
    first = Job(room / "first", command(packs, *flags, *save, "--exit-interval", f"{HALF}"))
    second = Job(room / "second", command(packs, *flags, *save))
    for job in (whole, first, second):  # a process each: Transformer Engine keeps scales of a process
        run_jobs(1, [job], environment=visible)
        assert job.exit() in (None, 0), job.printed()[-3000:]
    return whole, second


def test_bf16_learns(bf16):
    values = losses(bf16[0])
    assert len(values) == STEPS and values[-1] < 0.9 * values[0]


def test_bf16_goes_on_from_a_checkpoint(bf16):
    whole, second = map(losses, bf16)
    assert second == pytest.approx(whole[HALF:], rel=1e-3)


def test_fp8_delayed_goes_on_from_a_checkpoint(transformer_engine, packs, visible, tmp_path):
    """Its scales come from the steps before, and are part of a checkpoint."""
    whole, second = map(losses, trained_and_resumed(tmp_path, packs, fp8("delayed"), visible))
    assert second == pytest.approx(whole[HALF:], rel=5e-3)


def test_fp8_losses_follow_those_of_bf16(recipe, bf16, packs, visible, tmp_path):
    job = Job(tmp_path / "run", command(packs, *fp8(recipe)))
    run_jobs(1, [job], environment=visible)
    assert job.exit() in (None, 0), job.printed()[-3000:]
    assert losses(job) == pytest.approx(losses(bf16[0]), rel=1e-2)
