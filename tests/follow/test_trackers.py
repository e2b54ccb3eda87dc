"""Scores in the trackers of a run: each once, read back with the trackers' own readers."""

import importlib
import json
import sys
import types
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from neo_megatron.follow import trackers
from neo_megatron.follow.trackers import record, scalars_of
from neo_megatron.follow.watched_run import RunFacts
from neo_megatron.run.mlflow_run import EXPERIMENT, MlflowRun, named

NOTHING = RunFacts(None, "runs/one", "", "", "", "", "runs/one/wandb")


def row(step: int, match: float) -> dict:
    scores = {"questions": 4, "exact_match": match, "anls": match / 2, "cut": 0}
    return {"step": step, "exact_match": match, "anls": match / 2, "data_sets": {"web (é)": scores}}


ROWS = [row(2, 0.25), row(4, 0.5), row(6, 0.75)]
EXPECTED = {
    "scores/exact match": {2: 0.25, 4: 0.5, 6: 0.75},
    "scores/exact match by data set/web (é)": {2: 0.25, 4: 0.5, 6: 0.75},
    "scores/ANLS": {2: 0.125, 4: 0.25, 6: 0.375},
    "scores/ANLS by data set/web (é)": {2: 0.125, 4: 0.25, 6: 0.375},
}


@pytest.fixture
def events(tmp_path) -> Path:
    """The directory of a run's TensorBoard."""
    with SummaryWriter(str(tmp_path / "events")) as writer:
        writer.add_scalar("lm loss", 3.0, 1)
    return tmp_path / "events"


def logged(events: Path) -> dict[str, dict[int, float]]:
    reader = EventAccumulator(str(events / "scores"), size_guidance={"scalars": 0}).Reload()
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            assert event.step not in found[tag], "twice"
            found[tag][event.step] = event.value
    return dict(found)


def test_tensorboard(events):
    facts = replace(NOTHING, tensorboard_dir=str(events))
    assert record(facts, ROWS[:1]) == [] and record(facts, ROWS) == [] and record(facts, ROWS) == []
    assert logged(events) == EXPECTED
    assert len(list((events / "scores").iterdir())) == 2, "no file where nothing was missing"


@pytest.mark.parametrize("bytes_lost", [1, 30, 60, 100, 150])
def test_tensorboard_after_a_kill_that_tears_its_file(events, bytes_lost):
    facts = replace(NOTHING, tensorboard_dir=str(events))
    record(facts, ROWS[:2])
    (file,) = (events / "scores").iterdir()
    file.write_bytes(file.read_bytes()[:-bytes_lost])
    assert logged(events) != {tag: dict([*values.items()][:2]) for tag, values in EXPECTED.items()}
    assert record(facts, ROWS) == []
    assert logged(events) == EXPECTED


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """The client of a file store with three runs, the first two of which saved into the same directory."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for number, save in enumerate(("runs/one", "runs/one", "runs/two")):
        MlflowRun(tmp_path / "mlflow", str(number), {"save": save}, {}).end()
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())


def test_mlflow(mlflow, tmp_path):
    """The newest start of the run gets the scores; those that an earlier start has are not written again."""
    facts = replace(NOTHING, mlflow_dir=str(tmp_path / "mlflow"))
    runs = mlflow.search_runs([mlflow.get_experiment_by_name(EXPERIMENT).experiment_id])
    of = {run.info.run_name: run.info.run_id for run in runs}
    for tag, value in scalars_of(ROWS[0]).items():
        mlflow.log_metric(of["0"], named(tag), value, step=2)
    for _ in range(2):
        assert record(facts, ROWS) == []
        for tag, values in EXPECTED.items():
            points = mlflow.get_metric_history(of["1"], named(tag))
            assert [(point.step, point.value) for point in points] == [*values.items()][1:]
            assert len(mlflow.get_metric_history(of["0"], named(tag))) == 1
    assert not mlflow.get_run(of["2"]).data.metrics
    assert record(replace(facts, save="runs/three"), ROWS) == [
        f"MLflow has no new scores: {tmp_path}/mlflow has no run with --save runs/three"
    ]


def test_a_followed_run_is_found_in_mlflow(trained, run, follow, tmp_path, monkeypatch):
    """By the arguments in its checkpoints."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    follow(run, tmp_path / "out")
    client = MlflowClient(tracking_uri=trained.mlflow.as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    points = client.get_metric_history(found.info.run_id, "scores/ANLS")
    assert {point.step: point.value for point in points} == {row["step"]: pytest.approx(row["anls"]) for row in rows}


class FakeWandb(types.ModuleType):
    """Stands in for wandb, and for what its server would have."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.history: list[dict] = []
        self.attached: list[dict] = []
        self.axes: list[tuple] = []

    def Settings(self, **settings):
        return settings

    def init(self, **how):
        self.attached.append(how)
        return self

    def Api(self):
        self.default_entity = "me"
        return self

    def run(self, path):
        assert path == "me/neo/abc123"
        return self

    def scan_history(self, keys):
        return [entry for entry in self.history if all(key in entry for key in keys)]

    def define_metric(self, *axis, **of):
        self.axes.append((axis, of))

    def log(self, entry):
        self.history.append(entry)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "is_installed", lambda name: True)
    return fake


def test_weights_and_biases_as_a_second_writer(wandb, tmp_path):
    """Only against a stand-in: the service itself needs a network. The newest start of the run gets the scores."""
    for name in ("run-20250101_000000-old", "run-20260101_000000-abc123", "debug.log"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    facts = replace(NOTHING, wandb_project="neo", wandb_dir=str(tmp_path))
    assert record(facts, ROWS[:1]) == [] and record(facts, ROWS) == [] and record(facts, ROWS) == []
    assert [entry["checkpoint step"] for entry in wandb.history] == [2, 4, 6] and len(wandb.attached) == 2
    assert wandb.history[1].items() >= scalars_of(ROWS[1]).items()
    how = wandb.attached[0]
    assert (how["id"], how["project"], how["entity"]) == ("abc123", "neo", None)
    assert how["settings"] == {
        **{"mode": "shared", "x_primary": False, "x_update_finish_state": False, "x_label": "neo-megatron follow"}
    }
    assert wandb.axes[0] == (("scores/*",), {"step_metric": "checkpoint step"})


def test_an_offline_run_of_weights_and_biases_is_written_once_it_is_uploaded(wandb, tmp_path):
    run = tmp_path / "wandb" / "offline-run-20260101_000000-abc123"
    run.mkdir(parents=True)
    facts = replace(NOTHING, wandb_project="neo", wandb_dir=str(tmp_path))
    (sentence,) = record(facts, ROWS)
    assert sentence.startswith(f"Weights & Biases has no new scores: {run} is offline, and takes no second writer")
    assert sentence.endswith(f"upload it with wandb sync {run}") and not wandb.attached
    (run / "run-abc123.wandb.synced").touch()
    assert record(facts, ROWS) == [] and len(wandb.history) == 3


def test_the_settings_of_weights_and_biases_exist(monkeypatch):
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(mode="shared", x_primary=False, x_label="follow", x_update_finish_state=False)
    assert not settings.x_primary and callable(wandb.Api)
    assert callable(importlib.import_module("wandb.apis.public").Run.scan_history)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"tensorboard_dir": "nowhere"}, "TensorBoard has no new scores: nowhere has no events; start follow"),
        ({"mlflow_dir": "nowhere"}, "MLflow has no new scores: nowhere does not exist; start follow"),
        ({"wandb_project": "neo", "wandb_dir": "none"}, "Weights & Biases has no new scores: none/wandb has no run"),
    ],
)
def test_a_tracker_that_is_not_there_is_said(facts, sentence, monkeypatch, tmp_path):
    """And nothing is created: the path is from a checkpoint, which may be anybody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "is_installed", lambda name: True)
    (said,) = record(replace(NOTHING, **facts), ROWS)
    assert said.startswith(sentence) and not list(tmp_path.iterdir())


def test_one_tracker_that_fails_stops_no_other(events, monkeypatch):
    class Down:
        def __init__(self, facts) -> None:
            raise ConnectionError("no route to https://user:secret@host")

    monkeypatch.setattr(trackers, "MlflowScores", Down)
    facts = replace(NOTHING, tensorboard_dir=str(events), mlflow_dir="anywhere")
    assert record(facts, ROWS) == ["MLflow has no new scores: no route to https://***@host"]
    assert logged(events) == EXPECTED


def test_a_name_that_is_not_unicode_is_a_tag(events):
    odd = row(2, 0.5)
    odd["data_sets"] = {"caf\udce9": odd["data_sets"]["web (é)"]}
    assert record(replace(NOTHING, tensorboard_dir=str(events)), [odd]) == []
    assert r"scores/ANLS by data set/caf\udce9" in logged(events)
