"""A run that goes on with other flags, another optimizer or another precision: rightly, or with one sentence.

A few runs save; all others go on from copies of what they saved. One launch for each number of processes.
"""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.torch_dist import TRACKER, TorchDistDirectory
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import GlobalBatch, PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.run.output_lock import OutputLock

STEPS, START, BATCH = 8, 4, 4
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
KINDS = {"plain": "", "distributed": DISTRIBUTED, "plain-bf16": "--bf16", "distributed-bf16": f"{DISTRIBUTED} --bf16"}
# Another precision and the other optimizer at once, and the other one alone where there are masters; without,
# `test_run_checkpoints.py` changes it.
MOVES = [
    ("plain", "distributed-bf16"),
    ("distributed", "plain-bf16"),
    ("plain-bf16", "distributed"),
    ("distributed-bf16", "plain"),
    ("distributed-bf16", "plain-bf16"),
]
# A step that hardly moves what it starts from.
STILL = "--lr 1e-12 --min-lr 1e-12 --weight-decay 0 --adam-beta1 0.999999 --adam-beta2 0.999999 --clip-grad 1e-3"
HEAD_ALONE = (
    "--training-stage 1 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*5|L --train-iters 4 "
    "--save-interval 2"
)


def packs(room: Path, name: str, seed: int) -> None:
    """Packs of texts of many lengths, so that each pack has another number of targets."""
    draw = random.Random(seed)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    records = [
        {
            "conversations": [
                {"from": "human", "value": "Count!"},
                {"from": "gpt", "value": " ".join(draw.choices(words, k=draw.randint(1, 40)))},
            ]
        }
        for _ in range(60)
    ]
    (room / f"{name}.json").write_text(json.dumps(records))
    source = Source(name, str(room / f"{name}.json"), str(GOLDEN))
    preprocess(
        [source], GOLDEN / "tokenizer", room / f"{name}-shards", PreprocessConfig(min_pixels=4096, max_pixels=65536)
    )
    write_packs([PackInput(str(room / f"{name}-shards"))], room / f"{name}-packs", 192)


def command(room: Path, saved: Path, flags: str) -> list[str]:
    """Later flags win."""
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/first-packs"),
        *("--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--lr", "1e-4", "--min-lr", "1e-5"),
        *("--lr-warmup-iters", "0", "--num-workers", "0", "--log-interval", "1"),
        *("--pretrained-checkpoint", f"{room}/golden", "--load", str(saved), "--save", str(saved)),
        *("--save-interval", "4", *flags.split()),
    ]


# Shares that the run starts with, and what a user may have written when it goes on after 16 packs.
PHASE = "- {from: 0, shares: {first-packs: 2, other-packs: 1}}\n"
MIXTURES = {
    "mixture": PHASE,
    "mixture-later": PHASE + "- {from: 20, shares: {other-packs: 1}}\n",
    "mixture-before": "- {from: 0, shares: {first-packs: 1, other-packs: 1}}\n",
}


def mixed(room: Path, name: str, saved: Path, flags: str) -> Job:
    """A run of the mixture of this name."""
    (room / f"{name}.yaml").write_text(MIXTURES[name])
    words = command(room, saved, flags)
    place = words.index("--train-data-path")
    words[place : place + 2] = ["--mixture", f"{room}/{name}.yaml"]
    return Job(room / name, words)


def copy_of(room: Path, first: str, iteration: int, name: str) -> Path:
    """A run that has come to this iteration."""
    run = room / f"{name}-saved"
    shutil.copytree(room / f"{first}-saved" / f"iter_{iteration:07d}", run / f"iter_{iteration:07d}")
    (run / TRACKER).write_text(str(iteration))
    return run


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("resume-changes")
    packs(room, "first", 1)
    packs(room, "other", 2)
    for part in ("packs", "shards"):
        shutil.copytree(room / f"first-{part}", room / "copy" / f"first-{part}")
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    return room


def start(room: Path, name: str, flags: str) -> Job:
    return Job(room / name, command(room, room / f"{name}-saved", flags))


ITERATIONS = f"--train-iters {STEPS}"
# What changes on resume from iteration 4 of the reference.
CHANGES = {
    "batch": f"{ITERATIONS} --global-batch-size 8 --train-data-path {{room}}/copy/first-packs",
    "small-batch": f"{ITERATIONS} --global-batch-size 2 --micro-batch-size 2 {DISTRIBUTED}",
    "beta2": f"{ITERATIONS} --adam-beta2 0.5 --exit-interval 6",
    "rate": f"{ITERATIONS} --lr 2e-4 --min-lr 2e-5",
    "rate-override": f"{ITERATIONS} --lr 2e-4 --min-lr 2e-5 --override-opt-param-scheduler",
    "rate-keep": f"{ITERATIONS} --lr 2e-4 --min-lr 2e-5 --use-checkpoint-opt-param-scheduler --log-interval 3",
    "data": f"{ITERATIONS} --seed 3 --loss-weighting token --train-data-path {{room}}/other-packs --exit-interval 6",
    "no-load-optim": f"{ITERATIONS} --no-load-optim",
    "sgd": f"{ITERATIONS} --optimizer sgd",
    "held": ITERATIONS,
}


@pytest.fixture(scope="module")
def one(room) -> dict[str, Job]:
    """Runs of one process."""
    first = [
        start(room, "reference", ITERATIONS),
        start(room, "sgd-reference", f"{ITERATIONS} --optimizer sgd"),
        start(room, "samples", f"--train-samples {STEPS * BATCH} --exit-interval {START}"),
        start(room, "no-optimizer", f"{ITERATIONS} --no-save-optim --exit-interval {START}"),
        start(room, "skipped", f"{ITERATIONS} {DISTRIBUTED} --fp16 --initial-loss-scale 1e30 --exit-interval 2"),
        # A stage that starts from an iteration of another run, as `examples/train.sh ... --ckpt-step 4` does.
        start(room, "missing", f"{ITERATIONS} --load {room}/nowhere"),
        start(room, "step-alone", f"{ITERATIONS} --ckpt-step 3"),
        mixed(room, "mixture", room / "mixture-saved", f"{ITERATIONS} --exit-interval {START}"),
        start(room, "mixture-and-packs", f"{ITERATIONS} --mixture {room}/mixture.yaml"),
    ]
    run_jobs(1, first)
    second = [
        Job(room / name, command(room, copy_of(room, "reference", START, name), flags.format(room=room)))
        for name, flags in CHANGES.items()
    ]
    for name, flags in {"sgd-on": "", "sgd-momentum": "--sgd-momentum 0.5", "sgd-alone": "--sgd-momentum 0"}.items():
        saved = copy_of(room, "sgd-reference", START, name)
        second.append(Job(room / name, command(room, saved, f"{ITERATIONS} --optimizer sgd {flags}")))
    source = f"{ITERATIONS} --pretrained-checkpoint {room}/reference-saved --ckpt-step {START} --exit-interval 2"
    damaged = shutil.copytree(room / "reference-saved", room / "damaged")
    piece = next((damaged / f"iter_{START:07d}").glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1000])
    second += [
        Job(room / "samples-batch", command(room, room / "samples-saved", "--train-samples 32 --global-batch-size 8")),
        Job(room / "no-optimizer-on", command(room, room / "no-optimizer-saved", ITERATIONS)),
        Job(
            room / "skipped-on",
            command(room, room / "skipped-saved", f"{ITERATIONS} {DISTRIBUTED} --fp16 --exit-interval 4"),
        ),
        Job(room / "step", command(room, room / "step-saved", source)),
        Job(room / "step-on", command(room, room / "step-saved", source.replace("--exit-interval 2", ""))),
        Job(room / "step-damaged", command(room, room / "x-saved", source.replace("reference-saved", "damaged"))),
    ]
    for name in ("mixture-later", "mixture-before"):
        second.append(mixed(room, name, copy_of(room, "mixture", START, name), ITERATIONS))
    lock = OutputLock(room / "held-saved")
    lock.acquire()
    try:
        run_jobs(1, second)
    finally:
        lock.release()
    return {job.directory.name: job for job in (*first, *second)}


@pytest.fixture(scope="module")
def two(room) -> dict[str, Job]:
    """Runs of two processes."""
    first = [start(room, f"from-{kind}", f"--train-iters 2 --lr 1e-3 {flags}") for kind, flags in KINDS.items()]
    first += [start(room, "head", HEAD_ALONE)]
    run_jobs(2, first)
    second = []
    for source, target in MOVES:
        saved = copy_of(room, f"from-{source}", 2, f"{source}-to-{target}")
        flags = f"--train-iters 3 --save-interval 1 {STILL} --override-opt-param-scheduler {KINDS[target]}"
        second.append(Job(room / f"{source}-to-{target}", command(room, saved, flags)))
    second.append(Job(room / "head-on", command(room, copy_of(room, "head", 2, "head-on"), HEAD_ALONE)))
    run_jobs(2, second)
    return {job.directory.name: job for job in (*first, *second)}


def master(saved: TorchDistDirectory, parameter: str) -> torch.Tensor:
    names = (f"optimizer.state.fp32_param.{parameter}", f"optimizer.state.param.{parameter}", parameter)
    return saved.read(next(name for name in names if name in saved.shapes)).float()


@pytest.mark.parametrize("source, target", MOVES)
def test_another_precision_or_optimizer_has_exactly_the_masters_and_moments(room, two, source, target):
    before = TorchDistDirectory(room / f"from-{source}-saved")
    after = TorchDistDirectory(room / f"{source}-to-{target}-saved")
    parameters = [key.removeprefix("optimizer.state.exp_avg.") for key in before.shapes if ".exp_avg." in key]
    assert len(parameters) == 72
    rounded = 0
    for parameter in parameters:
        exact = master(before, parameter)
        rounded += int((exact.bfloat16().float() != exact).sum())
        torch.testing.assert_close(master(after, parameter), exact, atol=1e-9, rtol=0)
        weight = after.read(parameter)
        assert torch.equal(weight, master(after, parameter).to(weight.dtype)), parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{parameter}"
            assert (after.read(key) - before.read(key)).norm() <= 2e-5 * before.read(key).norm() + 1e-12, key
    assert rounded > 100_000, "bf16 alone would not do"


def test_a_pipeline_stage_that_holds_only_the_frozen_head_goes_on(two):
    assert two["head-on"].exit() is None
    expected = two["head"].scalars("lm loss")
    assert two["head-on"].scalars("lm loss") == {step: expected[step] for step in (3, 4)}


def targets(job: Job) -> list[int]:
    return [call["targets"] for call in job.inputs(0)]


def expected_targets(room: Path, first: int, last: int, batch: int) -> list[int]:
    dataset = PackDataset(room / "first-packs", last, 1234, images="none", global_batch=GlobalBatch(batch, 1, 1, first))
    return [len(dataset[number]["targets"]) for number in range(first, last)]


@pytest.mark.parametrize("name, batch, step", [("batch", 8, 1), ("small-batch", 2, 2)])
def test_another_batch_size_goes_on_with_the_next_packs_at_the_same_place_of_the_schedule(room, one, name, batch, step):
    job = one[name]
    assert job.exit() is None and f"--global-batch-size {BATCH} there, {batch} here" in job.printed()
    rates, expected = job.scalars("learning-rate"), one["reference"].scalars("learning-rate")
    assert rates == {number: pytest.approx(expected[number]) for number in range(START + 1, STEPS + 1)}
    consumed = START * BATCH
    packs = expected_targets(room, consumed, consumed + (STEPS - START) * batch, batch)
    assert targets(job) == np.reshape(packs, (-1, step)).sum(axis=1).tolist() and len(set(packs)) > 4
    assert "other packs" not in job.printed(), "a copy holds the same"


def test_a_run_that_counts_samples_reads_them_all_with_another_batch_size(room, one):
    job = one["samples-batch"]
    assert job.exit() is None
    assert list(job.scalars("lm loss")) == [START + 1, START + 2]
    assert targets(job) == expected_targets(room, START * BATCH, STEPS * BATCH, 8)
    assert job.scalars("learning-rate")[START + 2] == one["reference"].scalars("learning-rate")[STEPS]


def test_hyperparameters_are_those_of_the_command_line(room, one):
    assert "--adam-beta2 0.95 there, 0.5 here" in one["beta2"].printed()
    groups = TorchDistDirectory(room / "beta2-saved").common_state()["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.5)} and {g["step"] for g in groups} == {6}
    moment = "optimizer.state.exp_avg_sq.output_layer.weight"
    four, six = (
        TorchDistDirectory(room / run / f"iter_{iteration:07d}").read(moment)
        for run, iteration in (("reference-saved", 4), ("beta2-saved", 6))
    )
    assert (six >= 0.25 * four * (1 - 1e-6)).all() and (six < 0.9 * four).any(), "0.95 would leave 0.9025 of it"


def test_sgd_goes_on_with_its_momentum(one):
    expected = one["sgd-reference"].scalars("lm loss")
    losses = {name: one[name].scalars("lm loss") for name in ("sgd-on", "sgd-momentum", "sgd-alone")}
    assert losses["sgd-on"] == {step: expected[step] for step in range(START + 1, STEPS + 1)}
    for name, momentum in (("sgd-momentum", 0.5), ("sgd-alone", 0.0)):
        assert f"--sgd-momentum 0.9 there, {momentum} here" in one[name].printed()
        assert losses[name][START + 1] == expected[START + 1] and losses[name][STEPS] != expected[STEPS]
    assert "without momentum keeps no state" in one["sgd-alone"].printed()


def test_another_learning_rate_needs_a_word_and_then_works(one):
    sentence = one["rate"].exit()
    assert "--lr 0.0001 there, 0.0002 here; --min-lr 1e-05 there, 2e-05 here" in sentence
    assert "--override-opt-param-scheduler" in sentence and "--use-checkpoint-opt-param-scheduler" in sentence
    expected = one["reference"].scalars("learning-rate")
    steps = range(START + 1, STEPS + 1)
    assert one["rate-override"].scalars("learning-rate") == {n: [pytest.approx(2 * expected[n][0])] for n in steps}
    assert one["rate-keep"].scalars("learning-rate") == {n: [pytest.approx(expected[n][0])] for n in steps}
    losses = one["reference"].scalars("lm loss")
    assert one["rate-keep"].scalars("lm loss") == {n: [pytest.approx(losses[n][0], rel=2e-6)] for n in steps}


def test_changed_data_are_named(one):
    printed = one["data"].printed()
    assert one["data"].exit() == 0
    for words in ("--seed 1234 there, 3 here", "--loss-weighting square there, token here", "other packs in --train"):
        assert words in printed


def test_a_mixture_goes_on_with_the_packs_of_its_schedule(room, one):
    """Shares may change after what was read; the reference is the schedule read in one go."""
    dataset = PackDataset(
        room / "mixture-later.yaml", STEPS * BATCH, 1234, images="none", global_batch=GlobalBatch(BATCH, 1, 1)
    )
    expected = [len(dataset[number]["targets"]) for number in range(STEPS * BATCH)]
    assert one["mixture"].exit() == 0 and one["mixture-later"].exit() is None
    assert targets(one["mixture"]) + targets(one["mixture-later"]) == expected and len(set(expected)) > 8
    assert "--mixture has other shares from pack 20 on" in one["mixture-later"].printed()
    assert f"--mixture has other phases before pack {START * BATCH}" in one["mixture-before"].printed()
    assert "other phases" not in one["mixture-later"].printed()
    sentence = one["mixture-and-packs"].exit()
    assert "--mixture and --train-data-path both say what to train on" in sentence and "\n" not in sentence


def test_a_checkpoint_without_optimizer_state_goes_on_with_moments_of_zero(one):
    """Iteration, packs and schedule go on; the first loss depends on the weights alone."""
    reference = one["reference"]
    for name in ("no-optimizer-on", "no-load-optim"):
        job = one[name]
        assert job.exit() is None and "moments start at zero" in job.printed()
        assert job.scalars("learning-rate") == {n: reference.scalars("learning-rate")[n] for n in range(5, 9)}
        losses = job.scalars("lm loss")
        assert losses[5] == reference.scalars("lm loss")[5] and losses[7] != reference.scalars("lm loss")[7]
        assert targets(job) == targets(reference)[START * BATCH :]


def test_a_run_goes_on_after_steps_that_were_all_skipped(one):
    assert one["skipped"].exit() == 0 and one["skipped-on"].exit() == 0
    assert "number of skipped iterations:   1" in one["skipped"].printed()
    assert list(one["skipped-on"].scalars("lm loss")) == [3, 4]


def test_what_cannot_go_on_ends_in_a_sentence(room, one):
    for name, words in (
        ("missing", f"--load {room}/nowhere does not exist: give the --save directory of the run to resume, or leave"),
        ("step-alone", f"--pretrained-checkpoint {room}/golden: {room}/golden/iter_0000003 is missing"),
        ("sgd", "holds the state of --optimizer adam, this run has sgd: add --no-load-optim"),
        ("step-damaged", f"iter_{START:07d}/__0_0.distcp: has"),
        ("held", f"--save {room}/held-saved belongs to a run that is alive (process "),
    ):
        sentence = one[name].exit()
        assert words in sentence and "\n" not in sentence, (name, sentence)
    assert {path.name for path in (room / "held-saved").iterdir()} == {f"iter_{START:07d}", TRACKER}


def test_a_stage_starts_from_any_iteration_and_the_same_command_resumes_it(room, one):
    assert f"loading distributed checkpoint from {room}/reference-saved at iteration {START}" in one["step"].printed()
    assert f"a new run, starting from {room}/reference-saved/iter_{START:07d}\n" in one["step"].printed()
    assert list(one["step"].scalars("lm loss")) == [1, 2]
    assert list(one["step-on"].scalars("lm loss")) == list(range(3, STEPS + 1))


def test_each_line_of_the_log_covers_its_own_interval(one):
    def lines(job: Job) -> dict[int, float]:
        found = re.findall(r" iteration +(\d+)/.* lm loss: ([0-9.E+-]+) \|", job.printed())
        return {int(step): float(loss) for step, loss in found}

    losses = {step: values[0] for step, values in one["reference"].scalars("lm loss").items()}
    assert lines(one["reference"]) == {step: pytest.approx(loss, rel=1e-6) for step, loss in losses.items()}
    # Every third step; the first after a start is logged as well, and counts in its interval.
    kept = lines(one["rate-keep"])
    assert kept == {5: pytest.approx(losses[5], rel=1e-5), 6: pytest.approx((losses[5] + losses[6]) / 2, rel=1e-5)}
