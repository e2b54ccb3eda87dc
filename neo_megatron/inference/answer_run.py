"""The output directory of a run that answers many questions; it resumes after a kill and appears complete.

``answers.partial.jsonl`` grows while the run works: its first line is what decides the answers, then come the results,
a line for each batch. ``answers.jsonl`` is written last, so a directory that has only this one is
complete.
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from neo_megatron.atomic_files import is_partial, json_line, sync_directory, write_atomically
from neo_megatron.errors import DataError
from neo_megatron.locks import lock

ANSWERS, PROGRESS = "answers.jsonl", "answers.partial.jsonl"

Place = tuple[str, str, int, int | None, int]
"""As `Question.place`."""


class AnswerRun:
    """A locked output directory and the results so far. Use it in a ``with`` statement.

    Args:
        directory: new, or that of a run that was interrupted.
        plan: everything that decides the answers, keyed by the words of the error message about a difference.

    Raises:
        DataError: the directory holds other files, a finished run, one of another plan, or one that is running.
    """

    def __init__(self, directory: Path, plan: dict[str, Any]) -> None:
        self.directory = directory
        self.done: dict[Place, dict[str, Any]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / PROGRESS
        if (directory / ANSWERS).exists() and not path.exists():
            raise DataError(f"{directory} already holds answers; remove it, or choose another --output")
        if any(directory.iterdir()) and not path.exists():
            raise DataError(f"{directory} is not empty; choose another --output")
        self._file = open(lock(path, directory), "r+b")  # noqa: SIM115 - closed by __exit__
        try:
            self._begin(json.loads(json_line(plan)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerRun":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # closing fails again after a full disk, which `add` has reported
            self._file.close()  # releases the lock

    def add(self, results: Iterable[tuple[Place, dict[str, Any]]]) -> None:
        """Appends the results of a batch as one line, so that a kill keeps all or none of it.

        Raises:
            DataError: it cannot be written.
        """
        results = list(results)
        self.done.update(results)
        try:
            self._file.write(json_line({"results": results}))
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{self.directory / PROGRESS} cannot be written ({error.strerror}); remedy that, then run the same "
                "command again to continue"
            ) from error

    def finish(self, files: dict[str, bytes]) -> None:
        """Writes the files of the complete run, ``answers.jsonl`` last, and removes the partial file."""
        for name in sorted(files, key=lambda name: name == ANSWERS):
            write_atomically(self.directory / name, files[name])
        sync_directory(self.directory)
        (self.directory / PROGRESS).unlink()

    def _begin(self, plan: dict[str, Any]) -> None:
        """Reads what is there, up to a line that a kill has truncated, and continues after it."""
        lines = [line for line in self._file if line.endswith(b"\n")]
        before, *entries = map(json.loads, lines) if lines else [plan]
        for key in plan | before:
            # A run without any answer yet can be replaced, as after a mistake in its command.
            if entries and plan.get(key) != before.get(key):
                raise DataError(
                    f"{self.directory} holds an unfinished run with another {key}; "
                    "repeat its command to continue it, or remove the directory to start again"
                )
        for left in self.directory.iterdir():
            if is_partial(left.name):  # left by a run that was killed while it finished
                left.unlink()
        self.done = {tuple(place): result for entry in entries for place, result in entry["results"]}
        kept = lines if entries else [json_line(plan)]
        self._file.seek(0)
        self._file.writelines(kept)
        self._file.truncate()
        self._file.flush()
