"""The run's own log of scalars: `scalars.jsonl` in `--save`, whatever trackers are on.

A line is an object with the `step` and the scalars that were logged there, by tag; a step that is evaluated has a
second line. A number that is not finite is null, which JSON can hold. A run that resumes goes on after the step of its
checkpoint: lines of later steps, which it takes again, are removed, so that no step is there twice.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from neo_megatron.errors import DataError
from neo_megatron.run.console import say

NAME = "scalars.jsonl"


class ScalarFile:
    """Appends to the file, which a process opens once. A disk that is full stops the file, not the run.

    Args:
        directory: of the run.
        step: that the run starts from.

    Raises:
        DataError: what is there was not written by a run.
    """

    def __init__(self, directory: str | Path, step: int) -> None:
        self.path = Path(directory) / NAME
        self._failed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            end = _end_of(self.path, step) if self.path.exists() else 0
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, end)
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        if self._failed:
            return
        values = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        line = json.dumps({"step": step, **values}, allow_nan=False)
        try:
            os.write(self._file, f"{line}\n".encode())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        say(f"{self.path} cannot be written ({error.strerror}): training continues without it")


def _end_of(path: Path, step: int) -> int:
    """Bytes of the lines up to ``step``; lines are in the order of steps, and a kill may have cut the last one."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                at = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):
                at = None
            if type(at) is not int:
                raise DataError(f"{path}, line {number}: not a line of scalars with a step; move the file away")
            if at > step:
                break
            end += len(line)
    return end
