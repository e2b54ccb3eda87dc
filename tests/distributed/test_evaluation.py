"""Evaluation: which packs it reads, that no flags and no number of evaluations end a run, and runs that only evaluate.

With a learning rate of 0 every loss is that of the golden model. A run with one pack a step tells the loss of each
pack, and the weights are in the packs: what every evaluation has to give follows by hand.
"""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs

STEPS = 4


def command(room: Path, *flags: object, iterations: int | None = STEPS, trains: bool = True) -> list[str]:
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--pretrained-checkpoint", f"{room}/golden"),
        *(("--train-data-path", f"{room}/packs") if trains else ()),
        *(("--train-iters", str(iterations)) if iterations else ()),
        *(
            "--micro-batch-size",
            "1",
            "--global-batch-size",
            "4",
            "--lr",
            "0",
            "--min-lr",
            "0",
            "--lr-warmup-iters",
            "0",
        ),
        *("--num-workers", "0", "--log-interval", "1", "--override-opt-param-scheduler", *map(str, flags)),
    ]


MISTAKES = {
    "interval": ("--eval-interval 0", "--eval-interval 0: give a number of steps from 1 on"),
    "iters": ("--eval-iters -1", "--eval-iters -1: give 1 or more"),
    "full": ("--full-validation", "--full-validation needs --valid-data-path"),
    "skip": ("--skip-train", "--skip-train only evaluates: it needs --valid-data-path or --test-data-path"),
    "skip-nowhere": (
        "--skip-train --valid-data-path {packs} --load {packs}/none --save {packs}/none --pretrained-checkpoint=",
        "none does not exist: give the --save directory of the run",
    ),
    "skip-nothing": ("--skip-train --valid-data-path {packs} --eval-iters 0", "with --eval-iters 0 does nothing"),
}


@pytest.fixture(scope="module")
def few(room, tmp_path_factory) -> Path:
    """Packs of a quarter of the samples."""
    few = tmp_path_factory.mktemp("few") / "packs"
    write_packs([PackInput(str(room / "shards"), share=Fraction(1, 4))], few, 192)
    return few


@pytest.fixture(scope="module")
def runs(room, few, tmp_path_factory) -> dict[str, Job]:
    own = tmp_path_factory.mktemp("evaluation")
    valid, test = ("--valid-data-path", room / "packs"), ("--test-data-path", few)
    saved = ("--load", own / "saved", "--save", own / "saved", "--save-interval", 100)
    every = ("--eval-interval", 1, "--eval-iters", 3, "--eval-global-batch-size", 2)

    def job(name: str, *flags: object, **rest) -> Job:
        return Job(own / name, command(room, *flags, **rest))

    full = ("--full-validation", "--eval-global-batch-size", 8, "--eval-micro-batch-size", 2)
    one = [
        job("each", "--global-batch-size", 1, iterations=10),
        job("each-of-few", "--global-batch-size", 1, "--train-data-path", few, iterations=3),
        job("round", *valid, *every, *saved),
        job("more", *valid, "--eval-interval", 2, "--eval-iters", 3, *saved, iterations=6),
        job("full", *valid, *test, "--full-validation", "--eval-interval", 1, iterations=2),
        job("late", *valid, *every, "--start-eval-at-iter", 2, iterations=2),
        job("never", *valid, *every, "--start-eval-at-iter", 9, iterations=1),
        job("test", *test, *every, iterations=1),
        job("skip", *valid, *test, *full, "--skip-train", *saved, iterations=None, trains=False),
        job("skip-samples", *valid, *every, "--skip-train", "--train-samples", 16, iterations=None),
        job("limit", *valid, *test, *every, "--exit-duration-in-mins", -1),
        *(job(f"mistake-{name}", *flags.format(packs=room / "packs").split()) for name, (flags, _) in MISTAKES.items()),
    ]
    pipeline = ("--pipeline-model-parallel-size", 2)
    two = [
        job("full-dp2", *valid, *test, *full, "--num-workers", 1, iterations=1),
        job("full-vp2", *valid, *test, *full, *pipeline, "--num-virtual-stages-per-pipeline-rank", 2, "--skip-train"),
    ]
    run_jobs(1, one)
    run_jobs(2, two)
    return {run.directory.name: run for run in (*one, *two)}


@pytest.fixture(scope="module")
def expected(room, few, runs):
    """(split, numbers of packs) -> their loss."""
    weights, losses = {}, {}
    for split, packs, run in (("valid", room / "packs", "each"), ("test", few, "each-of-few")):
        dataset = PackDataset(packs, None, seed=1234, images="none")
        weights[split] = [float(dataset[number]["target_weight"].double().sum()) for number in range(len(dataset))]
        losses[split] = [runs[run].scalars("lm loss")[number + 1][0] for number in range(len(dataset))]
    assert len(weights["valid"]) == 10 and 1 < len(weights["test"]) < 4

    def loss(split: str, numbers) -> float:
        chosen = [number % len(weights[split]) for number in numbers]
        total = sum(weights[split][number] * losses[split][number] for number in chosen)
        return pytest.approx(total / sum(weights[split][number] for number in chosen), rel=2e-6)

    return loss


def reported(run: Job, split: str, rank: int = 0) -> dict[int, float]:
    """Printed results of a split, by iteration; the first of several at the same one."""
    words = "on test set" if split == "test" else "(?!on test set)"
    values: dict[int, float] = {}
    for line in run.printed(rank).splitlines():
        if match := re.match(rf" (?:validation|test) loss at iteration (\d+) {words}.*?lm loss value: (\S+)", line):
            values.setdefault(int(match[1]), float(match[2]))
    return values


def test_packs_go_round(runs, expected):
    """Six of ten packs in each evaluation."""
    assert runs["round"].exit() is None
    actual = reported(runs["round"], "valid")
    assert actual == {step: expected("valid", range(6 * (step - 1), 6 * step)) for step in range(1, STEPS + 1)}


def test_flags_of_evaluation_may_change_between_starts(runs, expected):
    """It goes on after the 24 packs of the run before it, and reads more of them than there are."""
    assert runs["more"].exit() is None
    assert reported(runs["more"], "valid") == {6: expected("valid", range(24, 24 + 3 * 4))}


@pytest.mark.parametrize("name", ["full", "skip", "full-dp2", "full-vp2"])
def test_full_validation_reads_every_pack_once(few, runs, expected, name):
    """Of both splits, though neither fills its last batch."""
    assert runs[name].exit() is None
    rank = 1 if "2" in name else 0
    valid, test = reported(runs[name], "valid", rank), reported(runs[name], "test", rank)
    steps = {"full": {1, 2}, "skip": {6}, "full-dp2": {1}, "full-vp2": {0}}[name]
    assert valid == dict.fromkeys(steps, expected("valid", range(10)))
    assert list(test) == [max(steps)] and list(test.values()) == [
        expected("test", range(len(PackDataset(few, None, seed=0))))
    ]


def test_a_finished_run_is_evaluated_and_left_alone(runs):
    """Without training data, from --save, where nothing is changed but the log."""
    saved = runs["skip"].directory.parent / "saved"
    assert sorted(path.name for path in saved.iterdir() if path.name != "logs") == [
        "iter_0000004",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
        "scalars.jsonl",
    ]
    last = json.loads((saved / "scalars.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and "lm loss validation" in last, "of training"
    assert "\ntraining ..." not in runs["skip"].printed()
    assert runs["skip-samples"].exit() is None and list(reported(runs["skip-samples"], "valid")) == [0]


def test_evaluation_begins_late(runs, expected):
    assert runs["late"].exit() is None and runs["never"].exit() is None
    assert reported(runs["late"], "valid") == {2: expected("valid", range(6))}
    assert reported(runs["never"], "valid") == {1: expected("valid", range(6))}, "after training"


def test_test_packs_alone(runs, expected):
    assert runs["test"].exit() is None and reported(runs["test"], "valid") == {}
    assert reported(runs["test"], "test") == {1: expected("test", range(6))}


def test_a_time_limit_within_an_evaluation_is_no_error(runs):
    assert runs["limit"].exit() == 0 and "timelimit reached" in runs["limit"].printed()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_a_sentence(runs, name):
    sentence = runs[f"mistake-{name}"].exit()
    assert sentence.startswith("pretrain_neo: ") and MISTAKES[name][1] in sentence and "\n" not in sentence
