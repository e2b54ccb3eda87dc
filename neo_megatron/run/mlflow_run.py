"""A run in a local file store of MLflow (`--mlflow-dir`): arguments, facts and scalars.

MLflow takes fewer characters in names than other trackers: each that it refuses becomes an underscore.
"""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPERIMENT = "neo_megatron"
_REFUSED = re.compile(r"[^\w/. -]")
# MLflow's limits for one request, and for the value of a parameter.
_METRICS, _PARAMETERS, _VALUE = 1000, 100, 6000


class MlflowRun:
    """Begins a run; every start of a training is one.

    Args:
        directory: of the file store.
        name: of the run.
        config: becomes its parameters.
        facts: become its tags.
    """

    def __init__(self, directory: str | Path, name: str, config: Mapping[str, Any], facts: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._client = client_of(directory)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        tags = {named(key): value for key, value in facts.items()}
        self._run = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        parameters = [Param(named(key), str(value)[:_VALUE]) for key, value in config.items()]
        for first in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._run, params=parameters[first : first + _PARAMETERS])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars of a step."""
        write_metrics(self._client, self._run, step, scalars)

    def end(self) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self._run)


def client_of(directory: str | Path) -> Any:
    """A client of the file store in a directory."""
    # MLflow maintains the file store, but no longer develops it, and since 3.17 asks for a word that it is meant. A
    # database needs more packages than the client of MLflow.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=Path(directory).absolute().as_uri())


def write_metrics(client: Any, run: str, step: int, scalars: Mapping[str, float]) -> None:
    """Logs the scalars of a step to a run, given its id."""
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    metrics = [Metric(named(tag), value, now, step) for tag, value in scalars.items()]
    for first in range(0, len(metrics), _METRICS):
        client.log_batch(run, metrics=metrics[first : first + _METRICS])


def named(tag: str) -> str:
    """The name of a scalar or fact in MLflow."""
    return _REFUSED.sub("_", tag)
