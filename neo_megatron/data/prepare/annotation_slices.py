"""Streams annotation files as slices of consecutive records; each slice is read by one worker and becomes one shard.

A slice is a position in its file; its worker reads the records from the file itself. The records of a compressed file
are in the slice, because it can only be read from its start. Memory holds a few slices at a time, whatever the size of
the file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from neo_megatron.data.permutation import permutation
from neo_megatron.data.prepare.file_kinds import COMPRESSED, FileKind, kind_of_file
from neo_megatron.data.prepare.record_bounds import MAX_RECORD_BYTES, Bounds
from neo_megatron.data.prepare.record_files import Record, open_records
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import Reason, RejectedSample

# Text of the records that a slice of a compressed file holds; it ends after the record that reaches this size.
MAX_SLICE_BYTES = 256 << 20


@dataclass(frozen=True)
class Place:
    """The position at which a slice begins.

    Args:
        number: of the slice, and of the shard that it becomes.
        source: index of its file in the list of sources.
        part: number of the slice within its data set, from 0.
        first: number of its first record in the file; blank lines are not counted.
        offset: of the end of the record before it, in bytes of text; in rows of Parquet and Arrow.
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
        bounds: int64 [records, 2], first byte of each record in the text of the file, and the byte after its last; for
            Parquet and Arrow its row, and the next.
        broken: why nothing can be read after the last record; "" if the file continues or ends as it should.
        share: of its records that is drawn.
        texts: of the records of a compressed file, ``None`` for one above the size limit; empty for other files.
        scale: bytes of the file for each unit of the bounds, about.
    """

    place: Place
    bounds: np.ndarray
    broken: str = ""
    share: Fraction = Fraction(1)
    texts: tuple[bytes | None, ...] = ()
    scale: float = 1.0

    @property
    def end(self) -> int:
        """Offset of the end of its last record."""
        return int(self.bounds[-1, 1]) if len(self.bounds) else self.place.offset

    def bytes_to(self, end: int) -> int:
        """Bytes of the file from the beginning of the slice to the end of one of its records, about."""
        return round((end - self.place.offset) * self.scale)

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
            return Place(self.place.number + 1, self.place.source + 1, self.place.part + 1, due=due)
        first = self.place.first + len(self.bounds)
        return Place(self.place.number + 1, self.place.source, self.place.part + 1, first, self.end, due)


def slices(
    sources: Sequence[Source],
    records_per_slice: int,
    place: Place = Place(),
    bounds_of: Callable[[int], Bounds | None] = lambda index: None,
) -> Iterator[Slice]:
    """Yields the slices from ``place`` on. They are cut at record counts, so the cut does not depend on the workers.

    Args:
        sources: all of a run.
        records_per_slice: records of a slice.
        place: where the first slice begins.
        bounds_of: the bounds of all records of a source, where they are found elsewhere.
    """
    for index in range(place.source, len(sources)):
        place = _at_start(place, sources, index)
        found = None if place.offset else bounds_of(index)
        for piece in _slices(sources[index], records_per_slice, place, found):
            yield piece
            place = piece.next


def _at_start(place: Place, sources: Sequence[Source], index: int) -> Place:
    """The place at the start of a source, unless the place is within it. The files of a data set number parts together.

    A place at offset 0 follows a source that is broken.
    """
    if index == place.source and (place.offset or place.part == 0):
        return place
    before = sources[place.source - (index == place.source)]
    part = place.part if before.name == sources[index].name else 0
    return Place(place.number, index, part, due=place.due)


def read_slice(piece: Slice, source: Source, seed: int) -> Iterator[tuple[int, Record]]:
    """(record number, record) of the records drawn from a slice, in order; see `Record`."""
    drawn, times = np.unique(drawn_records(piece, source, seed), return_counts=True)
    with ExitStack() as stack:
        records: Iterable[Record]
        if piece.texts:
            records = [piece.texts[number] for number in drawn]
        else:
            file = stack.enter_context(open_records(source.annotations, source.version))
            records = file.read(piece.bounds[drawn], MAX_RECORD_BYTES)
        for number, count, record in zip(drawn.tolist(), times.tolist(), records, strict=True):
            for _ in range(count):
                yield piece.place.first + number, record


def rejected_rest(piece: Slice, source: Source) -> RejectedSample:
    """The rejection of the record at which a slice is broken, which stands for all after it."""
    kind = kind_of_file(source.annotations)
    is_json = kind is FileKind.JSON or kind in COMPRESSED
    return RejectedSample(Reason.BROKEN_JSON if is_json else Reason.UNREADABLE_RECORD, piece.broken)


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


def _slices(source: Source, records_per_slice: int, place: Place, found: Bounds | None) -> Iterator[Slice]:
    with open_records(source.annotations, source.version) as file:
        found = found or file.bounds(place.offset)
        waiting: list[np.ndarray] = []
        texts: list[bytes | None] = []
        count, broken = 0, None
        while broken is None:
            try:
                bounds = next(found)
            except StopIteration as end:
                bounds, broken = np.empty((0, 2), np.int64), end.value
            waiting.append(bounds)
            texts += file.take(bounds)
            count += len(bounds)
            while cut := _cut(count, texts, records_per_slice):
                known = np.concatenate(waiting)
                piece = Slice(place, known[:cut], "", source.share, tuple(texts[:cut]), file.scale)
                yield piece
                place = piece.next
                waiting, texts, count = [known[cut:]], texts[cut:], count - cut
        if count or broken:
            yield Slice(place, np.concatenate(waiting), broken, source.share, tuple(texts), file.scale)


def _cut(count: int, texts: list[bytes | None], records_per_slice: int) -> int:
    """How many of the records found become the next slice; 0 if more are needed."""
    held = 0
    for number, text in enumerate(texts[:records_per_slice], start=1):
        held += len(text or b"")
        if held >= MAX_SLICE_BYTES:
            return number
    return records_per_slice if count >= records_per_slice else 0
