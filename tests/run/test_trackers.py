"""Weights & Biases and MLflow themselves, offline: scalars and facts of a run are read back from their files."""

import json
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from support.golden_packs import make_packs
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs
from support.processes import run_forked

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.run.changes import identity_of_packs
from neo_megatron.run.mlflow_run import EXPERIMENT, named
from neo_megatron.run.run_facts import git_commit

Scalars = dict[str, dict[int, float]]
"""Tag -> step -> value."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Job:
    """A run with all trackers."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    room = tmp_path_factory.mktemp("trackers")
    make_packs(room, repeats=4, seq_length=192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    command = [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--pretrained-checkpoint", f"{room}/golden"),
        *("--train-data-path", f"{room}/packs", "--valid-data-path", f"{room}/packs", "--eval-iters", "1"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2", "--log-interval", "1"),
        *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "0", "--num-workers", "0"),
        *("--save", f"{room}/saved", "--mlflow-dir", f"{room}/mlflow"),
        *("--wandb-project", "neo", "--wandb-exp-name", "one", "--wandb-save-dir", f"{room}/wandb"),
    ]
    job = Job(room / "run", command)
    run_jobs(1, [job], {"WANDB_MODE": "offline"})
    assert job.exit() is None
    return job


@pytest.fixture(scope="module")
def expected(run) -> Scalars:
    """The run's own file, whose numbers are those of TensorBoard (`tests/distributed/test_looking.py`)."""
    scalars: Scalars = defaultdict(dict)
    for line in (run.directory.parent / "saved" / "scalars.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for tag, value in values.items():
            scalars[tag][step] = value
    assert {"lm loss", "lm loss validation", "looking/delta-blank validation"} <= scalars.keys()
    return dict(scalars)


def facts(run: Job) -> dict[str, str]:
    packs = identity_of_packs(f"{run.directory.parent}/packs")
    return {
        "git commit": git_commit(Path(__file__).parent),
        "versions/torch": version("torch"),
        "packs/train": packs,
        "packs/valid": packs,
    }


@pytest.fixture(scope="module")
def planned(run) -> dict[str, float]:
    """Numbers of `neo-megatron plan` for the run."""
    done = run_forked(
        *(
            "-m",
            "neo_megatron",
            "plan",
            "--neo-model",
            GOLDEN / "ckpt_untied",
            "--packs",
            f"{run.directory.parent}/packs",
        ),
        *("--precision", "fp32", "--transformer-impl", "local", "--gpu", "h100", "--gpus", "1", "--json"),
        *("--micro-batch-size", "1", "--global-batch-size", "2"),
        separate=True,
    )
    plan = json.loads(done.stdout)
    return {"memory": plan["needed"] / 1e9, "seconds": plan["time"]["seconds"], "mfu": 100 * plan["time"]["mfu"]}


def check_plan(fact: str, planned: dict[str, float]) -> None:
    """Of a tracker; there is no GPU here."""
    told = json.loads(fact)
    assert (told["gpu"], told["fits"]) == ("h100", True)
    assert told["memory of the fullest rank (GB)"] == round(planned["memory"], 3)
    assert told["seconds per step"] == pytest.approx(planned["seconds"], rel=1e-3)
    assert told["MFU (%)"] == round(planned["mfu"], 1)


def records(file: bytes) -> Iterator[bytes]:
    """The records of an offline run: a head of 7 bytes, then LevelDB's log format, which cuts records at blocks."""
    place, record = 7, b""
    while place + 7 <= len(file):
        left = 32768 - place % 32768
        _, size, kind = struct.unpack_from("<IHB", file, place) if left >= 7 else (0, 0, 0)
        if not kind:  # the rest of the block is empty
            place += left
            continue
        record += file[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # complete, or the last part
            yield record
            record = b""


def test_weights_and_biases(run, expected, planned):
    from wandb.proto import wandb_internal_pb2

    (file,) = (run.directory.parent / "wandb").glob("**/*.wandb")
    config, scalars = {}, defaultdict(dict)
    for content in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        for update in (*record.run.config.update, *record.config.update):
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for tag, value in items.items():
            if not tag.startswith("_"):
                scalars[tag][items["_step"]] = value
    assert scalars == expected
    assert config["train_iters"] == 2 and facts(run).items() <= config.items()
    check_plan(config["plan"], planned)


def test_mlflow(run, expected, planned, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as its file store asks of everyone who reads one
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run.directory.parent / "mlflow").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "one"
    assert found.data.params["train_iters"] == "2"
    assert {named(name): value for name, value in facts(run).items()}.items() <= found.data.tags.items()
    check_plan(found.data.tags["plan"], planned)
    for tag, of_step in expected.items():
        history = client.get_metric_history(found.info.run_id, named(tag))
        assert {point.step: point.value for point in history} == pytest.approx(of_step), tag
    assert found.data.metrics.keys() == set(map(named, expected))


def test_tensorboard_keeps_the_facts(run, planned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "events")).Reload()
    for name, value in facts(run).items():
        (text,) = events.Tensors(f"{name}/text_summary")
        assert text.tensor_proto.string_val[0].decode() == value
    (plan,) = events.Tensors("plan/text_summary")
    check_plan(plan.tensor_proto.string_val[0].decode(), planned)


def test_names_that_mlflow_refuses():
    assert named("performance/MFU (%)") == "performance/MFU ___"
    assert named("lm loss by data set/web_2.0-é") == "lm loss by data set/web_2.0-é"


def test_the_commit_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) == "none"

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}, changed"
