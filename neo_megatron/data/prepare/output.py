"""The output of a run of preprocessing: a local directory, or an address of object storage.

Shards are written into a local directory either way. For object storage that is a temporary one for each slice, whose
files are uploaded before the outcome of the slice: after a kill a slice is complete and has an outcome, or runs again.
The state of a run is in the output itself, so another machine can continue it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from neo_megatron.data.prepare.resume import (
    LARGEST,
    Outcome,
    load_outcome,
    name_of_outcome,
    outcome_line,
    parse_outcome,
    save_outcome,
)
from neo_megatron.storage.base import is_remote, join
from neo_megatron.storage.object_writer import ObjectWriter
from neo_megatron.storage.staging import staging_directory

_OUTCOMES = 256  # that are in memory at the same time


class ShardOutput(Protocol):
    """The output of a run; it is sent to the workers.

    Attributes:
        location: path or address.
    """

    location: str

    def room(self) -> AbstractContextManager[Path]:
        """A directory for new files."""
        ...

    def publish(self, room: Path, name: str) -> None:
        """Makes a complete file of the room part of the output."""
        ...

    def save(self, room: Path, outcome: Outcome) -> None:
        """Makes a shard, whose files are complete in the room, part of the output, and then its outcome."""
        ...

    def load(self, numbers: Sequence[int]) -> Iterator[Outcome]:
        """The outcomes of slices. Raises DamagedFile for a file that is not what `save` writes."""
        ...


class LocalOutput:
    """A directory, in which files are written where they stay."""

    def __init__(self, location: Path) -> None:
        self.location = str(location)
        self._path = location

    @contextmanager
    def room(self) -> Iterator[Path]:
        yield self._path

    def publish(self, room: Path, name: str) -> None:
        pass

    def save(self, room: Path, outcome: Outcome) -> None:
        save_outcome(self._path, outcome)

    def load(self, numbers: Sequence[int]) -> Iterator[Outcome]:
        return (load_outcome(self._path, number) for number in numbers)


class RemoteOutput:
    """A prefix of object storage. A machine needs local room (``TMPDIR``) for the shards that its workers write."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self._objects = ObjectWriter(location)

    @contextmanager
    def room(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=staging_directory(self.location)) as directory:
            yield Path(directory)

    def publish(self, room: Path, name: str) -> None:
        self._objects.upload([room / name])

    def save(self, room: Path, outcome: Outcome) -> None:
        files = outcome.shard["files"] if outcome.shard else {}
        self._objects.upload([room / name for name in files])
        self._objects.write(name_of_outcome(outcome.number), outcome_line(outcome))

    def load(self, numbers: Sequence[int]) -> Iterator[Outcome]:
        for first in range(0, len(numbers), _OUTCOMES):
            some = numbers[first : first + _OUTCOMES]
            names = list(map(name_of_outcome, some))
            for name, number, data in zip(names, some, self._objects.read(names, LARGEST), strict=True):
                yield parse_outcome(data, number, join(self.location, name))


def open_output(location: str | Path) -> ShardOutput:
    """The output at a path or an address."""
    return RemoteOutput(str(location)) if is_remote(location) else LocalOutput(Path(location))
