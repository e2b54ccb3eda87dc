"""Annotation files -> slices of consecutive records, streamed; one worker reads a slice, and makes one shard of it.

A JSONL slice is a place in the file. A JSON array has no such marks, so its records are parsed as a stream and handed
on as lines. Memory holds a few slices at a time, whatever the size of the file.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import ijson
import numpy as np

from neo_megatron.data.draw import permutation
from neo_megatron.data.errors import DataError
from neo_megatron.data.registry import Source

# A line, or an element of an array, longer than this is no annotation; it is refused before it fills the memory.
MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class Slice:
    """Consecutive records of one annotation file.

    Args:
        number: of the shard that it becomes.
        source: index of its file in the list of sources.
        part: which slice of its own source it is, from 0.
        first: number of its first record in the file; blank lines are not counted.
        count: records in it.
        start: offset of the first record in a JSONL file, in ``lines`` for a JSON array.
        lines: the records as JSON lines where the file is an array.
        broken: why nothing can be read after the last record; empty where the file goes on or ends well.
    """

    number: int
    source: int
    part: int
    first: int
    count: int
    start: int
    lines: bytes | None = None
    broken: str = ""


def slices(sources: Sequence[Source], records_per_slice: int) -> Iterator[Slice]:
    """All records of all sources in order. Cut at record counts, so that the cut does not depend on the workers."""
    number = 0
    for index, source in enumerate(sources):
        cut = _jsonl_slices if source.annotations.endswith(".jsonl") else _json_slices
        for part, fields in enumerate(cut(Path(source.annotations), records_per_slice)):
            yield Slice(number=number, source=index, part=part, **fields)
            number += 1


def read_slice(piece: Slice, source: Source, seed: int) -> Iterator[tuple[int, bytes | None]]:
    """(record number, JSON text) of the records drawn from a slice, in order; ``None`` for one over the size limit."""
    times = np.bincount(drawn_records(piece, source, seed), minlength=piece.count)
    with io.BytesIO(piece.lines) if piece.lines is not None else open(source.annotations, "rb") as stream:
        stream.seek(piece.start)
        for offset, line in zip(range(piece.count), _records(stream), strict=False):
            for _ in range(times[offset]):
                yield piece.first + offset, line


def drawn_records(piece: Slice, source: Source, seed: int) -> np.ndarray:
    """Offsets of the records of a slice that are used, ascending, repeated where the share is above 1.

    The number is exact: rounding is that of the running total, so the slices of a file of N records hold
    ``round(N * share)``. Who is drawn depends on (seed, name of the data set, slice) alone.
    """
    last = piece.first + piece.count
    total = _round(last * source.share) - _round(piece.first * source.share)
    whole, rest = divmod(total, max(piece.count, 1))
    some = permutation(piece.count, seed, source.name, piece.part)[:rest]
    return np.sort(np.concatenate([np.repeat(np.arange(piece.count), whole), some]))


def _round(value: Fraction) -> int:
    return int(value + Fraction(1, 2))


def _records(stream: BinaryIO) -> Iterator[bytes | None]:
    """Every line that is not blank; ``None`` stands for a line over the size limit."""
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        too_long = len(line) > MAX_RECORD_BYTES
        while len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_RECORD_BYTES + 1)
        if too_long or not line.isspace():
            yield None if too_long else line


def _jsonl_slices(path: Path, records_per_slice: int) -> Iterator[dict]:
    first = count = start = 0
    with path.open("rb") as stream:
        for _ in _records(stream):
            count += 1
            if count == records_per_slice:
                yield {"first": first, "count": count, "start": start}
                first, count, start = first + count, 0, stream.tell()
    if count:
        yield {"first": first, "count": count, "start": start}


def _json_slices(path: Path, records_per_slice: int) -> Iterator[dict]:
    first, lines, broken = 0, [], ""
    with path.open("rb") as file:
        stream = _BoundedStream(file)
        if not stream.begins_array():
            raise DataError(f"{path} holds no JSON array; a file with one record a line must be named .jsonl")
        records = ijson.items(stream, "item", use_float=True)
        while True:
            try:
                lines.append(_line(next(records)))
            except StopIteration:
                break
            except (ijson.JSONError, ValueError) as error:
                broken = f"the JSON array breaks off here: {' '.join(str(error).split())[:200]}"
                break
            stream.since_record = 0
            if len(lines) == records_per_slice:
                yield _lines_slice(first, lines)
                first, lines = first + len(lines), []
    if lines or broken:
        yield _lines_slice(first, lines) | {"broken": broken}


def _lines_slice(first: int, lines: list[bytes]) -> dict:
    return {"first": first, "count": len(lines), "start": 0, "lines": b"\n".join(lines)}


def _line(record: object) -> bytes:
    try:
        return json.dumps(record).encode()
    except RecursionError:
        # Only this record is lost: the worker cannot parse the line and rejects it under its number.
        return b"nested too deeply to be an annotation"


class _BoundedStream:
    """A file that refuses to be read on when one element of the array has used up the size limit."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.since_record = 0

    def begins_array(self) -> bool:
        """Whether the first character is ``[``; leaves the file at its start, past a byte order mark."""
        start = 3 if self.file.read(3) == b"\xef\xbb\xbf" else 0
        self.file.seek(start)
        while (byte := self.file.read(1)).isspace():
            pass
        self.file.seek(start)
        return byte == b"["

    def read(self, size: int) -> bytes:
        self.since_record += size
        if self.since_record > MAX_RECORD_BYTES:
            raise ValueError(f"one record is longer than {MAX_RECORD_BYTES >> 20} MiB")
        return self.file.read(size)
