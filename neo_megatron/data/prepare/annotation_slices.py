"""Streams annotation files as slices of consecutive records; each slice is read by one worker and becomes one shard.

A slice is a position in its file; its worker reads the records from the file itself. Memory holds a few slices at a
time, whatever the size of the file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from neo_megatron.data.permutation import permutation
from neo_megatron.data.prepare.record_bounds import element_bounds, line_bounds
from neo_megatron.data.prepare.registry import Source

# A longer record is not an annotation; it is rejected before it fills the memory.
MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class Place:
    """The position at which a slice begins.

    Args:
        number: of the slice, and of the shard that it becomes.
        source: index of its file in the list of sources.
        part: number of the slice within its source, from 0.
        first: number of its first record in the file; blank lines are not counted.
        offset: in bytes, of the end of the record before it.
        due: fraction of a record, as text, by which the records drawn so far fall short of the sum of the shares.
    """

    number: int = 0
    source: int = 0
    part: int = 0
    first: int = 0
    offset: int = 0
    due: str = "0"


@dataclass(frozen=True)
class Slice:
    """Consecutive records of one annotation file.

    Args:
        place: where it begins.
        bounds: int64 [records, 2], first byte of each record in the file, and the byte after its last.
        broken: why nothing can be read after the last record; "" if the file continues or ends as it should.
        share: of its records that is drawn.
    """

    place: Place
    bounds: np.ndarray
    broken: str = ""
    share: Fraction = Fraction(1)

    @property
    def end(self) -> int:
        """Offset of the byte after its last record."""
        return int(self.bounds[-1, 1]) if len(self.bounds) else self.place.offset

    @property
    def drawn(self) -> int:
        """Records drawn, repetitions included, so that the running total over all slices is the rounded share."""
        before = Fraction(self.place.due)
        return _round(before + len(self.bounds) * self.share) - _round(before)

    @property
    def next(self) -> Place:
        """The position of the next slice, which is in the next file if this one is broken."""
        due = str((Fraction(self.place.due) + len(self.bounds) * self.share) % 1)
        if self.broken:
            return Place(self.place.number + 1, self.place.source + 1, due=due)
        first = self.place.first + len(self.bounds)
        return Place(self.place.number + 1, self.place.source, self.place.part + 1, first, self.end, due)


def slices(sources: Sequence[Source], records_per_slice: int, place: Place = Place()) -> Iterator[Slice]:
    """Yields the slices from ``place`` on. They are cut at record counts, so the cut does not depend on the workers."""
    for index in range(place.source, len(sources)):
        if index != place.source:
            place = Place(place.number, index, due=place.due)
        for piece in _slices(sources[index], records_per_slice, place):
            yield piece
            place = piece.next


def read_slice(piece: Slice, source: Source, seed: int) -> Iterator[tuple[int, bytes | None]]:
    """(record number, JSON text) of the records drawn from a slice, in order; text ``None`` above the size limit."""
    with open(source.annotations, "rb", buffering=1 << 20) as file:
        for drawn in drawn_records(piece, source, seed).tolist():
            begin, end = piece.bounds[drawn].tolist()
            if end - begin > MAX_RECORD_BYTES:
                text = None
            else:
                file.seek(begin)
                text = file.read(end - begin)
            yield piece.place.first + drawn, text


def drawn_records(piece: Slice, source: Source, seed: int) -> np.ndarray:
    """Indices of the records of a slice that are used, ascending, repeated for a share above 1: int64 [n].

    The total is exact: the running total over the slices of all sources in their order is rounded, so the shares of
    many small sources add up too. Which records are drawn depends on (seed, name of the data set, slice) alone; the
    number may be one more or less after other sources.
    """
    count = len(piece.bounds)
    times, rest = divmod(piece.drawn, max(count, 1))
    some = permutation(count, seed, source.name, piece.place.part)[:rest]
    return np.sort(np.concatenate([np.repeat(np.arange(count), times), some]))


def _round(value: Fraction) -> int:
    return int(value + Fraction(1, 2))


def _slices(source: Source, records_per_slice: int, place: Place) -> Iterator[Slice]:
    find = line_bounds if source.annotations.endswith(".jsonl") else element_bounds
    with open(source.annotations, "rb") as file:
        found = find(file, place.offset)
        waiting: list[np.ndarray] = []
        count, broken = 0, None
        while broken is None:
            try:
                bounds = next(found)
            except StopIteration as end:
                bounds, broken = np.empty((0, 2), np.int64), end.value
            waiting.append(bounds)
            count += len(bounds)
            while count >= records_per_slice:
                known = np.concatenate(waiting)
                piece = Slice(place, known[:records_per_slice], share=source.share)
                yield piece
                place = piece.next
                waiting, count = [known[records_per_slice:]], count - records_per_slice
        if count or broken:
            yield Slice(place, np.concatenate(waiting), broken, source.share)
