"""A run of preprocessing that writes to object storage, with the files that `resume` describes as objects.

There are no locks between machines. Two runs of the same command write the same bytes, and a run of another command
finds the plan of the first one and ends.
"""

from collections.abc import Container, Iterator
from typing import Any

from neo_megatron.atomic_files import json_line
from neo_megatron.data.prepare.output import RemoteOutput
from neo_megatron.data.prepare.resume import (
    LARGEST,
    PLAN,
    Outcome,
    check_same_plan,
    is_kept,
    is_of_a_run,
    number_of_outcome,
)
from neo_megatron.errors import DataError
from neo_megatron.storage.base import MANIFEST, join
from neo_megatron.storage.object_writer import ObjectWriter
from neo_megatron.storage.staging import Staging


class RemoteRun:
    """As `resume.Run`, for an address. Use it in a ``with`` statement.

    Raises:
        DataError: it holds a finished data set or other objects, or another run of this user and machine is writing to
            it.
    """

    def __init__(self, location: str) -> None:
        self._output = RemoteOutput(location)
        self._objects = ObjectWriter(location)
        self._location = self._output.location
        self._sizes = self._objects.sizes()
        if PLAN not in self._sizes and MANIFEST in self._sizes:
            raise DataError(f"{self._location} already holds a data set; remove it, or choose another --output")
        if PLAN not in self._sizes and self._sizes:
            raise DataError(f"{self._location} is not empty; choose another --output")
        self._staging = Staging(self._location)

    def __enter__(self) -> "RemoteRun":
        return self

    def __exit__(self, *_: object) -> None:
        self._staging.close()

    @property
    def has_manifest(self) -> bool:
        """Whether the data set is complete, so that only clearing up is left."""
        return MANIFEST in self._sizes

    def begin(self, plan: dict[str, Any]) -> None:
        """Writes the plan of a new run, or checks that it equals that of the run to be continued.

        Raises:
            DataError: the plans differ; the text says in what.
        """
        if PLAN in self._sizes:
            (written,) = self._objects.read([PLAN], LARGEST)
            check_same_plan(written, plan, self._location, join(self._location, PLAN))
        else:
            self._objects.write(PLAN, json_line(plan))

    def outcomes(self) -> Iterator[Outcome]:
        """The outcomes of slices whose shards are there, in any order."""
        numbers = [number for number in map(number_of_outcome, self._sizes) if number is not None]
        for outcome in self._output.load(numbers):
            files = outcome.shard["files"] if outcome.shard else {}
            if all(self._sizes.get(name) == file["bytes"] for name, file in files.items()):
                yield outcome

    def keep(self, done: Container[int]) -> None:
        """Removes the objects of slices that are not done."""
        self._objects.delete([name for name in self._sizes if is_of_a_run(name) and not is_kept(name, done)])

    def clear(self) -> None:
        """Removes the objects of an unfinished run, the plan last."""
        self._objects.delete([name for name in self._objects.sizes() if number_of_outcome(name) is not None])
        self._objects.delete([PLAN])
