"""Writes the scores of steps into the trackers of the run that is followed, each score once.

What a tracker has is read back before anything is written, so that no mark can disagree with it after a kill.
"""

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from neo_megatron.errors import redacted
from neo_megatron.follow.watched_run import RunFacts
from neo_megatron.packages import install, is_installed
from neo_megatron.run.mlflow_run import EXPERIMENT, client_of, named, write_metrics

SUB_RUN = "scores"
_METRICS = {"exact_match": "exact match", "anls": "ANLS"}
_WANDB_STEP = "checkpoint step"
_ELSEWHERE = "start follow on a machine and in a directory from which the path leads there"
_WANDB_RUN = re.compile(r"(offline-)?run-(\d{8}_\d{6})-(\w+)")

Scalars = dict[str, float]
"""Tag -> value, of one step."""


class Unavailable(Exception):
    """A tracker cannot be written; the text says why, and what to do."""


class Tracker(Protocol):
    """One tracker of a run."""

    def missing(self, scalars: Mapping[int, Scalars]) -> dict[int, Scalars]:
        """The scalars that it does not have yet, by step."""

    def write(self, scalars: Mapping[int, Scalars]) -> None:
        """Adds scalars, and returns when they are kept."""


def scalars_of(row: Mapping[str, Any]) -> Scalars:
    """The scalars of a line of ``scores.jsonl``."""
    found = {f"scores/{label}": row[key] for key, label in _METRICS.items()}
    for name, scores in row["data_sets"].items():
        tag = name.encode(errors="backslashreplace").decode()  # a name may hold bytes that are not Unicode
        found |= {f"scores/{label} by data set/{tag}": scores[key] for key, label in _METRICS.items()}
    for task, metrics in row.get("lmms_eval", {}).items():
        found |= {f"lmms-eval/{task}/{metric}": value for metric, value in metrics.items()}
    return found


def record(facts: RunFacts, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes what is missing into each tracker of a run; gives a sentence for each that cannot be written."""
    scalars = {row["step"]: scalars_of(row) for row in rows}
    kinds: dict[str, tuple[str, Callable[[RunFacts], Tracker]]] = {
        "TensorBoard": (facts.tensorboard_dir, TensorBoardScores),
        "MLflow": (facts.mlflow_dir, MlflowScores),
        "Weights & Biases": (facts.wandb_project, WandbScores),
    }
    sentences = []
    for name, (given, open_tracker) in kinds.items():
        if not given:
            continue
        try:
            tracker = open_tracker(facts)
            if missing := tracker.missing(scalars):
                tracker.write(missing)
        except Exception as error:  # of any kind: servers and file stores of others, which may be back at the next try
            what = str(error).split("\n")[0] or type(error).__name__
            sentences.append(f"{name} has no new scores: {redacted(what)}")
    return sentences


class TensorBoardScores:
    """The sub-run `scores` in the run's directory.

    A file of another writer in the directory of the run itself would hide the run's: TensorBoard reads the last file
    of a directory only, unless it is told otherwise.
    """

    def __init__(self, facts: RunFacts) -> None:
        run = Path(facts.tensorboard_dir)
        # The path is from a checkpoint, which may be anybody's: only next to events is anything written.
        if not any(run.glob("events.out.tfevents.*")):
            raise Unavailable(f"{run} has no events; {_ELSEWHERE}")
        self._directory = run / SUB_RUN

    def missing(self, scalars: Mapping[int, Scalars]) -> dict[int, Scalars]:
        events = EventAccumulator(str(self._directory), size_guidance={"scalars": 0})
        if self._directory.is_dir():
            events.Reload()
        there = {(tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
        return _without(there, scalars)

    def write(self, scalars: Mapping[int, Scalars]) -> None:
        with SummaryWriter(str(self._directory)) as writer:
            for step, values in scalars.items():
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)


class MlflowScores:
    """The newest of the runs that have saved into the same directory: each start of a training is one."""

    def __init__(self, facts: RunFacts) -> None:
        if not is_installed("mlflow"):
            raise Unavailable(f"mlflow is not installed: {install('mlflow')}")
        if not Path(facts.mlflow_dir).is_dir():
            raise Unavailable(f"{facts.mlflow_dir} does not exist; {_ELSEWHERE}")
        self._client = client_of(facts.mlflow_dir)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        runs, token = [], None
        while experiment:
            page = self._client.search_runs([experiment.experiment_id], page_token=token)
            runs += [run.info for run in page if run.data.params.get("save") == facts.save]
            if not (token := page.token):
                break
        if not runs:
            raise Unavailable(f"{facts.mlflow_dir} has no run with --save {facts.save}")
        self._runs = [run.run_id for run in sorted(runs, key=lambda run: run.start_time)]

    def missing(self, scalars: Mapping[int, Scalars]) -> dict[int, Scalars]:
        tags = {tag for values in scalars.values() for tag in values}
        there = {
            (tag, point.step)
            for run in self._runs
            for tag in tags
            for point in self._client.get_metric_history(run, named(tag))
        }
        return _without(there, scalars)

    def write(self, scalars: Mapping[int, Scalars]) -> None:
        for step, values in scalars.items():
            write_metrics(self._client, self._runs[-1], step, values)


class WandbScores:
    """The newest run in the directory of Weights & Biases, as a second writer of it.

    Its own step only rises, so the scores have an axis of their own.
    """

    def __init__(self, facts: RunFacts) -> None:
        if not is_installed("wandb"):
            raise Unavailable(f"wandb is not installed: {install('wandb')}")
        self._directory = Path(facts.wandb_dir) / "wandb"
        names = os.listdir(self._directory) if self._directory.is_dir() else []
        runs = [match for name in names if (match := _WANDB_RUN.fullmatch(name))]
        found = max(runs, key=lambda match: match[2], default=None)
        if found is None:
            raise Unavailable(f"{self._directory} has no run; {_ELSEWHERE}")
        run = self._directory / found[0]
        if found[1] and not any(run.glob("*.wandb.synced")):
            raise Unavailable(f"{run} is offline, and takes no second writer; upload it with wandb sync {run}")
        self._wandb = importlib.import_module("wandb")
        self._run = {"project": facts.wandb_project, "entity": facts.wandb_entity or None, "id": found[3]}

    def missing(self, scalars: Mapping[int, Scalars]) -> dict[int, Scalars]:
        """The scalars of a step are one entry, which is there or not."""
        api = self._wandb.Api()
        run = api.run(f"{self._run['entity'] or api.default_entity}/{self._run['project']}/{self._run['id']}")
        there = {entry[_WANDB_STEP] for entry in run.scan_history(keys=[_WANDB_STEP])}
        return {step: values for step, values in scalars.items() if step not in there}

    def write(self, scalars: Mapping[int, Scalars]) -> None:
        settings = self._wandb.Settings(
            mode="shared", x_primary=False, x_label="neo-megatron follow", x_update_finish_state=False
        )
        with TemporaryDirectory() as room, self._wandb.init(**self._run, dir=room, settings=settings) as run:
            for tags in ("scores/*", "lmms-eval/*"):
                run.define_metric(tags, step_metric=_WANDB_STEP)
            for step, values in scalars.items():
                run.log({**values, _WANDB_STEP: step})


def _without(there: set[tuple[str, int]], scalars: Mapping[int, Scalars]) -> dict[int, Scalars]:
    """The scalars that are not among (tag, step) pairs."""
    left = {
        step: {tag: value for tag, value in values.items() if (tag, step) not in there}
        for step, values in scalars.items()
    }
    return {step: values for step, values in left.items() if values}
