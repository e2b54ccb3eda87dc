"""Runs tasks of lmms-eval on an export, with the user's installation of it."""

import ctypes
import json
import math
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_megatron.errors import ConfigError, DataError
from neo_megatron.inference.batches import Task

LOG = "log.txt"
_RESULTS = "*_results.json"
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class LmmsEval:
    """Tasks of lmms-eval.

    Args:
        command: the beginning of its command line, such as ``python -m lmms_eval``.
        tasks: their names.
        batch_size: questions answered together.
    """

    command: Sequence[str]
    tasks: Sequence[str]
    batch_size: int

    def run(self, task: Task, output: Path) -> None:
        """Writes a directory with the files of lmms-eval and what it printed; it appears by renaming.

        Args:
            task: the model and how it is asked.

        Raises:
            ConfigError: the directory of the model cannot be given to lmms-eval.
            DataError: lmms-eval cannot be started, or has no results; they name the log.
        """
        partial = output.with_name(f"{output.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        words = [*self.command, "--model", "neo", "--model_args", _model_arguments(task, partial)]
        words += ["--tasks", ",".join(self.tasks), "--batch_size", str(self.batch_size), "--output_path", str(partial)]
        log = partial / LOG
        with log.open("wb") as file:
            try:
                # A process that outlived this one would write into the directory of the next.
                done = subprocess.run(
                    words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
                )
            except OSError as error:
                raise DataError(
                    f"{self.command[0]} cannot be started ({error.strerror}); correct --lmms-eval-command"
                ) from error
        if done.returncode or not any(partial.rglob(_RESULTS)):  # it may end with 0 after an error
            raise DataError(
                f"lmms-eval has no results (exit code {done.returncode}): {log} says why; remedy it, then run the same "
                "command again"
            )
        partial.rename(output)


def lmms_eval_results(directory: Path) -> dict[str, dict[str, float]]:
    """Task -> metric -> score, of the files of lmms-eval; nothing of what is not a finite number."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(directory.rglob(_RESULTS)):
        for task, values in json.loads(path.read_bytes())["results"].items():
            found[task] = {_metric(key): value for key, value in values.items() if _is_score(key, value)}
    return found


def _model_arguments(task: Task, room: Path) -> str:
    settings = task.settings
    arguments = {
        "pretrained": str(task.model.absolute()),
        "dtype": task.dtype,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "chat_layout": settings.chat_layout,
        "image_text": task.image_text,
    }
    if task.system:  # as a file, because a comma would end the argument
        (room / "system.txt").write_text(task.system)
        arguments["system_prompt"] = str((room / "system.txt").absolute())
    if any("," in str(value) or "=" in str(value) for value in arguments.values()):
        raise ConfigError(f"lmms-eval cannot take {task.model}: , and = divide its arguments; choose another --output")
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def _end_with_parent() -> None:
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _metric(key: str) -> str:
    """The name of a metric, which lmms-eval writes with that of a filter of answers."""
    return key.removesuffix(",none")


def _is_score(key: str, value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and "_stderr" not in key
