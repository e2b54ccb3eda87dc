"""Figures in log and TensorBoard of real runs on two processes, against counts made of the dense mask of every pack."""

import json
import re
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
from support.golden_packs import make_packs
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.model.mask import AttentionRule
from neo_megatron.planning.flops import model_flops
from neo_megatron.planning.workload import Workload
from neo_megatron.run import step_log
from neo_megatron.run.console import ShortLines
from neo_megatron.run.step_log import StepLog

WANDB = """
import json, os
config = {}
init = lambda **settings: log({"settings": settings["dir"]}, 0)
finish = lambda: log({"finished": True}, 0)
def log(values, step):
    values = {name: getattr(value, "tolist", lambda: value)() for name, value in values.items()}
    with open(os.environ["WANDB_LOG"], "a") as file:
        file.write(json.dumps([step, values]) + "\\n")
"""
LENGTH, SEED = 192, 1234
SIZES = sizes_of(str(GOLDEN / "ckpt_untied"))


def broken_and_intact(room: Path) -> Path:
    """Packs of one sample each; every second sample has nothing but a broken image to answer to."""
    images = room / "images"
    images.mkdir()
    intact = (GOLDEN / "images" / "b.png").read_bytes()
    (images / "intact.png").write_bytes(intact)
    (images / "broken.png").write_bytes(intact[:-200])
    turns = [
        {"from": "human", "value": "<image>\n" + "Which colour is it? " * 8},
        {"from": "gpt", "value": "Red, I say."},
    ]
    records = [{"image": f"{name}.png", "conversations": turns} for name in ("intact", "broken") * 4]
    (room / "one-each.json").write_text(json.dumps(records))
    source = Source("one-each", str(room / "one-each.json"), str(images))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=65536, check="header")
    preprocess([source], GOLDEN / "tokenizer", room / "one-each-shards", settings)
    write_packs([PackInput(str(room / "one-each-shards"))], room / "one-each", LENGTH)
    return room / "one-each"


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("step_log")
    make_packs(room, repeats=4, seq_length=LENGTH)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    (room / "modules").mkdir()
    (room / "modules" / "wandb.py").write_text(WANDB)
    return room


@pytest.fixture(scope="module")
def runs(room) -> dict[str, Job]:
    def command(*flags: str, packs: Path = room / "packs", batch: int = 4, interval: int = 2) -> list[str]:
        return [
            *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", str(packs), "--seed", str(SEED)),
            *("--micro-batch-size", "1", "--global-batch-size", str(batch), "--train-iters", "4"),
            *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "0", "--num-workers", "0"),
            *("--log-interval", str(interval), "--pretrained-checkpoint", f"{room}/golden", *flags),
        ]

    pipeline = ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|t|t|ttL"]
    half_broken = ["--max-broken-samples", "1", "--pipeline-model-parallel-size", "2"]
    evaluated = ["--valid-data-path", f"{room}/packs", "--test-data-path", f"{room}/packs"]
    evaluated += ["--eval-iters", "1", "--eval-interval", "2"]
    wandb = ["--wandb-project", "neo", "--wandb-exp-name", "one", "--wandb-save-dir", f"{room}/wandb"]
    wandb += ["--timing-log-level", "1", "--exit-interval", "2"]
    jobs = {
        "data": Job(room / "data", command(*evaluated)),
        "virtual": Job(room / "virtual", command("--training-stage", "1", *pipeline)),
        "broken": Job(room / "broken", command(*half_broken, packs=broken_and_intact(room), batch=1, interval=4)),
        "wandb": Job(room / "wandb-run", command(*wandb), tensorboard=False),
    }
    run_jobs(2, list(jobs.values()), {"PYTHONPATH": f"{room}/modules:{Path.cwd()}", "WANDB_LOG": f"{room}/wandb.jsonl"})
    return jobs


def lines(job: Job) -> list[dict[str, str]]:
    """The figures of each step's line, keyed by their names; rank 1 of two logs."""
    found = re.findall(r"iteration +\d+/ *\d+ \|(.*)", job.printed(rank=1))
    return [dict(part.strip().rsplit(": ", 1) for part in line.split("|") if ":" in part) for line in found]


def expected(room: Path, first: int, last: int, stage: int) -> tuple[float, float]:
    """Operations and padding fraction of some packs, in the order in which they are read."""
    packs = PackDataset(room / "packs", 16, SEED, images="none")
    items = [packs[number] for number in range(first, last)]
    tokens = LENGTH * len(items)
    pairs = sum(AttentionRule(i["document"][None], i["image"][None]).dense().sum().item() for i in items)
    images = sum((i["image"] >= 0).sum().item() for i in items)
    workload = Workload(LENGTH, pairs / tokens, images / tokens, sum(len(i["targets"]) for i in items) / tokens)
    padding = sum((i["document"] < 0).sum().item() for i in items) / tokens
    return model_flops(SIZES, stage, workload).total(SIZES).model * tokens, padding


@pytest.mark.parametrize(("name", "stage"), [("data", 2), ("virtual", 1)])
def test_throughput_counts_neos_operations(room, runs, name, stage):
    """Over data-parallel ranks, which read different packs, and with virtual stages, which read them twice."""
    job = runs[name]
    seconds, throughput = job.scalars("iteration-time"), job.scalars("throughput")
    tokens = job.scalars("performance/tokens per second per GPU")
    assert set(seconds) == {2, 4}
    for step in seconds:
        operations, padding = expected(room, 4 * step - 8, 4 * step, stage)
        per_gpu_second = 2 * 2 * seconds[step][0]  # of two steps on two ranks
        assert throughput[step] == [pytest.approx(operations / per_gpu_second / 1e12, rel=1e-5)]
        assert tokens[step] == [pytest.approx(8 * LENGTH / per_gpu_second, rel=1e-5)]
        line = lines(job)[[2, 4].index(step) - 2]
        assert float(line["padding fraction"]) == pytest.approx(padding, abs=1e-4)
        assert float(line["tokens per second per GPU"]) == pytest.approx(tokens[step][0], rel=1e-3, abs=0.1)
    for step in (1, 2, 3, 4):
        _, padding = expected(room, 4 * step - 4, 4 * step, stage)
        assert job.scalars("data/padding fraction")[step] == [pytest.approx(padding)]
    assert "MFU (%)" not in lines(job)[0]  # a CPU has no stated rate


def test_packs_are_called_packs(runs):
    job = runs["data"]
    assert [line["consumed packs"].strip() for line in lines(job)] == ["4", "8", "16"]
    assert "Evaluating on 4 packs" in job.printed()
    assert job.scalars("lm loss vs packs") == {4 * step: loss for step, loss in job.scalars("lm loss").items()}
    for rank in (0, 1):
        assert "consumed samples" not in job.printed(rank)


def test_every_evaluation_is_logged_once_under_the_name_of_its_split(runs):
    job = runs["data"]
    validation, test = job.scalars("lm loss validation"), job.scalars("lm loss test")
    assert set(validation) == {2, 4} and set(test) == {4}
    assert all(len(values) == 1 for values in (*validation.values(), *test.values()))
    assert job.printed(rank=1).count(" validation loss at iteration") == 2
    assert " test loss at iteration 4 on test set" in job.printed(rank=1)


def test_steps_without_loss_weight_leave_the_interval_its_loss(room, runs):
    job = runs["broken"]
    losses = job.scalars("lm loss")
    assert 1 <= len(losses) < 4, "the packs must hold steps of both kinds"
    last = lines(job)[-1]
    assert float(last["lm loss"]) == pytest.approx(sum(loss for (loss,) in losses.values()) / len(losses), rel=1e-5)
    assert int(last["steps without loss weight"]) == int(last["samples with a broken image"]) == 4 - len(losses)
    assert sum(value for (value,) in job.scalars("data/broken samples").values()) == 4 - len(losses)


def test_weights_and_biases_needs_no_tensorboard(room, runs):
    logged = [json.loads(line) for line in (room / "wandb.jsonl").read_text().splitlines()]
    steps = {name: [step for step, values in logged if name in values] for name in ("lm loss", "iteration-time")}
    assert steps == {"lm loss": [1, 2], "iteration-time": [2]}
    names = {name for _, values in logged for name in values}
    assert {
        "performance/tokens per second per GPU",
        "data/padding fraction",
        "iteration-time",
        "packs vs steps",
    } <= names
    assert any(name.endswith("-time") and name != "iteration-time" for name in names)  # of Megatron's timers
    assert not any("samples vs" in name or "vs samples" in name for name in names)
    assert not (runs["wandb"].directory / "events").exists()


def test_mfu_uses_the_stated_rate_of_the_gpu(room, megatron, monkeypatch):
    """On four GPUs of 1 GFLOP/s that take 10 seconds for a step of two micro-batches; and what the screen shows."""
    monkeypatch.setattr(step_log, "_peak", lambda args: 1e9)
    monkeypatch.setattr(step_log, "_training_seconds", lambda: clock)
    args = Namespace(neo_sizes=asdict(SIZES), training_stage=1, unfreeze="", world_size=4, rank=0, save=None)
    args.mlflow_dir = args.wandb_project = args.tensorboard_dir = None
    args.consumed_train_samples = 4
    args.log_interval = args.tensorboard_log_interval = 1
    clock, log = 0.0, StepLog()
    log.begin(args)
    packs = PackDataset(room / "packs", 4, SEED, images="none")
    for pair in (0, 2):
        log.note(collate([packs[pair], packs[pair + 1]]))
    log.end_step()
    operations, _ = expected(room, 0, 4, stage=1)
    assert log.operations(args, 4) == pytest.approx(operations)
    shown = []

    def megatrons(losses, first):
        nonlocal clock
        clock = 10.0
        shown.append(log.line(" [now] iteration 1/ 1 | consumed samples:            4 | global batch size:     4 |"))

    log.training_log(megatrons, {}, {}, iteration=1, skipped=0, first=True)
    assert "consumed packs:            4 |" in shown[0]
    tokens, mfu = 4 * LENGTH / 10 / 4, operations / 10 / 4 / 1e9
    assert f"| tokens per second per GPU: {tokens:.1f} | MFU (%): {100 * mfu:.1f} |" in shown[0]
    assert mfu > 0.01
    assert ShortLines(warnings=False)(shown[0]) == f"iteration 1/1 | tokens/s/GPU {tokens:g} | MFU % {100 * mfu:.1f}"
