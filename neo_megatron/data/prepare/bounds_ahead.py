"""Finds the records of tars in processes of their own, some files ahead of the one that is cut into slices.

Every header of a tar has to be read to find the next, which one process cannot do for many workers.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np

from neo_megatron.data.prepare.file_kinds import FileKind, kind_of_file
from neo_megatron.data.prepare.record_bounds import Bounds
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.tar_records import group_bounds
from neo_megatron.errors import DataError
from neo_megatron.storage.open import open_source
from neo_megatron.worker_pool import WorkerDied, WorkerPool, in_order

_WORKERS_EACH, _MOST_PROCESSES = 4, 8
# The bounds of all records of a file are held in memory: up to a 32nd of its size, where all members are empty.
_LARGEST = 4 << 30

_Found = tuple[np.ndarray, str]
"""The bounds of all records of a file, int64 [records, 2], and why nothing can be read after them."""


class BoundsAhead:
    """The bounds of the records of small tars that follow each other.

    Args:
        sources: of a run; the bounds of each are asked for in their order.
        workers: of the run, for which records are found; few need no help.
    """

    def __init__(self, sources: Sequence[Source], workers: int) -> None:
        self._sources = sources
        self._processes = min(_MOST_PROCESSES, workers // _WORKERS_EACH)
        self._is_small_tar = cache(self._look_at)
        self._pool: WorkerPool | None = None
        self._found: Iterator[_Found] = iter(())

    def of(self, index: int) -> Bounds | None:
        """The bounds of the records of a source from its start on; ``None`` if it is better read here.

        Raises:
            DataError, OSError: from the bounds, if the file cannot be read, or a process died.
        """
        if not self._processes or not self._is_small_tar(index):
            return None
        if self._pool is None:
            if not self._is_small_tar(index + 1):
                return None
            self._pool = WorkerPool(self._processes, _prepare, None, lambda: None)
            later = range(index, len(self._sources))
            tars = (self._sources[number].annotations for number in later if self._is_small_tar(number))
            self._found = in_order(self._pool, tars)
        return self._next()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.close()

    def _next(self) -> Bounds:
        try:
            bounds, broken = next(self._found)
        except WorkerDied as died:
            raise DataError(
                f"a worker died ({died.how}) while it looked for the records of {died.item}; run the same command "
                "again to continue, with fewer --workers if memory ran out"
            ) from died
        if len(bounds):
            yield bounds
        return broken

    def _look_at(self, index: int) -> bool:
        path = self._sources[index].annotations if index < len(self._sources) else ""
        return os.path.isfile(path) and kind_of_file(path) is FileKind.TAR and os.path.getsize(path) <= _LARGEST


def _prepare(_: None, report: Callable[[], None]) -> Callable[[str], _Found]:
    return _find


def _find(path: str) -> _Found:
    found = [np.empty((0, 2), np.int64)]
    with open_source(path) as file:
        bounds = group_bounds(file)
        while True:
            try:
                found.append(next(bounds))
            except StopIteration as end:
                return np.concatenate(found), end.value
