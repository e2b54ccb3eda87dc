"""Opens an annotation file of any kind: finds the bounds of its records, and reads those that a worker asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from neo_megatron.data.prepare.arrow_records import ArrowRows
from neo_megatron.data.prepare.compressed import CompressedText
from neo_megatron.data.prepare.file_kinds import COMPRESSED, FileKind, has_lines, kind_of_file
from neo_megatron.data.prepare.parquet_records import ParquetRows
from neo_megatron.data.prepare.record_bounds import Bounds, element_bounds, line_bounds
from neo_megatron.data.prepare.tar_records import group_bounds, read_groups
from neo_megatron.errors import RejectedSample
from neo_megatron.storage.open import open_source
from neo_megatron.storage.source_files import SourceFile

Record = bytes | dict[str, Any] | RejectedSample | None
"""JSON text; a record that needs no parsing; why a record is rejected; or ``None`` for text above the size limit."""


class RecordFile(Protocol):
    """An open annotation file."""

    @property
    def scale(self) -> float:
        """Bytes of the file for each unit of the bounds, about."""

    def bounds(self, start: int) -> Bounds:
        """The bounds of the records from a bound on, in order."""

    def take(self, bounds: np.ndarray) -> list[bytes | None]:
        """The texts within bounds that were just found, if they cannot be read later; else empty."""

    def read(self, bounds: np.ndarray, largest: int) -> Iterator[Record]:
        """The records within ascending bounds; ``None`` for JSON text of over ``largest`` bytes."""


@contextmanager
def open_records(path: str, version: str = "") -> Iterator[RecordFile]:
    """An annotation file, opened by its kind.

    Args:
        path: or address.
        version: that an object must have, at the end too; "" for any.

    Raises:
        DataError: it is damaged as a whole, or an object has changed.
    """
    with open_source(path, version) as file:
        kind = kind_of_file(path)
        if kind in COMPRESSED:
            yield _Compressed(file, kind)
        elif kind is FileKind.TAR:
            yield _Tar(file)
        elif kind is FileKind.PARQUET:
            yield _Table(ParquetRows(file))
        elif kind is FileKind.JSON:
            yield _Json(file)
        else:
            yield _Table(ArrowRows(file, kind))
        file.check_unchanged()


class _Json:
    scale = 1.0

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def bounds(self, start: int) -> Bounds:
        self._file.will_read(self._file.size)
        return (line_bounds if has_lines(self._file.name) else element_bounds)(self._file, start)

    def take(self, bounds: np.ndarray) -> list[bytes | None]:
        return []

    def read(self, bounds: np.ndarray, largest: int) -> Iterator[Record]:
        self._file.will_read(_end(bounds))
        text = self._file.stream()
        for begin, end in bounds.tolist():
            if end - begin > largest:
                yield None
            else:
                text.seek(begin)
                yield text.read(end - begin)


class _Compressed:
    def __init__(self, file: SourceFile, kind: FileKind) -> None:
        self._text = CompressedText(file.stream(), kind)

    @property
    def scale(self) -> float:
        return self._text.compressed_bytes / max(1, self._text.size)

    def bounds(self, start: int) -> Bounds:
        return (line_bounds if has_lines(self._text.name) else element_bounds)(self._text, start)

    def take(self, bounds: np.ndarray) -> list[bytes | None]:
        texts = [self._text.take(begin, end) for begin, end in bounds.tolist()]
        if len(bounds):
            self._text.release(int(bounds[-1, 1]))
        return texts

    def read(self, bounds: np.ndarray, largest: int) -> Iterator[Record]:
        assert not len(bounds), "the texts are in the slice"
        return iter(())


class _Tar:
    scale = 1.0

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def bounds(self, start: int) -> Bounds:
        self._file.will_read(self._file.size)
        return group_bounds(self._file, start)

    def take(self, bounds: np.ndarray) -> list[bytes | None]:
        return []

    def read(self, bounds: np.ndarray, largest: int) -> Iterator[Record]:
        self._file.will_read(_end(bounds))
        return read_groups(self._file, bounds.tolist())


class _Table:
    def __init__(self, rows: ParquetRows | ArrowRows) -> None:
        self._rows = rows

    @property
    def scale(self) -> float:
        return self._rows.bytes_per_row

    def bounds(self, start: int) -> Bounds:
        return self._rows.bounds(start)

    def take(self, bounds: np.ndarray) -> list[bytes | None]:
        return []

    def read(self, bounds: np.ndarray, largest: int) -> Iterator[Record]:
        return self._rows.read(bounds[:, 0].tolist())


def _end(bounds: np.ndarray) -> int:
    return int(bounds[-1, 1]) if len(bounds) else 0
