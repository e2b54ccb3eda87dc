"""Reads the rows of a Parquet file as records, a few at a time: memory is that of pages, not of row groups.

The footer of a file is not trusted: it is limited before it is read, and rows that it promises and the file does not
have are rejected one by one. A page may expand to gigabytes, so reading is limited as decoding of images is.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.prepare.arrow_values import reason_of, records_of
from neo_megatron.data.prepare.record_bounds import Bounds
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import open_source
from neo_megatron.storage.source_files import SourceFile

MAX_FOOTER_BYTES = 128 << 20
# Rows that are decoded together; less where they are large.
_BATCH_ROWS, _BATCH_BYTES = 64, 16 << 20
_BUFFER_BYTES = 1 << 20
ROWS_AT_ONCE = 1 << 16
# A file with more rows for each of its bytes says nothing in most of them; it would only fill the list of rejects.
_MAX_ROWS_PER_BYTE, _FREE_ROWS = 8, 1 << 20


class ParquetRows:
    """The rows of an open Parquet file.

    Raises:
        DataError: the file is damaged or too large for its footer.
    """

    def __init__(self, file: SourceFile) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = file.name
        size = file.size
        _check_footer(file)
        self._errors = (pyarrow.ArrowException, OSError, MemoryError, ValueError)
        try:
            with limited_memory():
                # Buffered, or a column of a row group is read at once; not mapped, because the file may be cut then.
                self._file = pyarrow.parquet.ParquetFile(
                    opened_by_arrow(file), buffer_size=_BUFFER_BYTES, pre_buffer=False, memory_map=False
                )
        except self._errors as error:
            raise _damaged(file.name, reason_of(error)) from error
        groups = [self._file.metadata.row_group(number) for number in range(self._file.metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        self.rows = self._file.metadata.num_rows
        if min(rows, default=0) < 0 or sum(rows) != self.rows:
            raise _damaged(file.name, f"its row groups have {sum(rows):,} rows, its footer says {self.rows:,}")
        check_rows(file.name, self.rows, size)
        self._sizes = [group.total_byte_size for group in groups]
        self._ends = np.cumsum([0, *rows])
        self.bytes_per_row = size / max(1, self.rows)

    def bounds(self, start: int) -> Bounds:
        """Row numbers from ``start`` on, and the numbers after them."""
        yield from row_bounds(start, self.rows)
        return ""

    def read(self, rows: Iterable[int]) -> Iterator[dict[str, Any] | RejectedSample]:
        """The record, or why it is rejected, of each of these rows in ascending order."""
        wanted = np.fromiter(rows, np.int64)
        groups = np.searchsorted(self._ends, wanted, side="right") - 1
        for group in np.unique(groups).tolist():
            yield from self._read_group(group, int(self._ends[group]), wanted[groups == group].tolist())

    def _read_group(self, group: int, first: int, rows: list[int]) -> Iterator[dict[str, Any] | RejectedSample]:
        """Rows of a row group; those after damage are rejected, because pages can only be read in order."""
        waiting = iter(rows)
        row = next(waiting, None)
        batches = self._batches(group)
        while row is not None:
            try:
                with limited_memory():
                    batch = next(batches, None)
                    if batch is None:
                        raise ValueError(f"the row group has {first - int(self._ends[group])} rows")
                    within = row < first + len(batch)
                    records = list(records_of(batch, self._path)) if within else []
            except self._errors as error:
                why = f"row group {group} cannot be read from row {first} on ({reason_of(error)})"
                while row is not None:
                    yield RejectedSample(Reason.UNREADABLE_RECORD, why)
                    row = next(waiting, None)
                return
            while row is not None and row < first + len(batch):
                yield records[row - first]
                row = next(waiting, None)
            first += len(batch)

    def _batches(self, group: int) -> Iterator[Any]:
        rows = int(self._ends[group + 1] - self._ends[group])
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, self._sizes[group])))
        return self._file.iter_batches(batch_size=size, row_groups=[group], use_threads=False)


def row_bounds(start: int, rows: int) -> Iterator[np.ndarray]:
    """Bounds of the rows from ``start`` to ``rows``: int64 [n, 2]."""
    for begin in range(start, rows, ROWS_AT_ONCE):
        numbers = np.arange(begin, min(begin + ROWS_AT_ONCE, rows), dtype=np.int64)
        yield np.stack([numbers, numbers + 1], axis=1)


def check_rows(path: str, rows: int, size: int) -> None:
    """Rejects a file that claims more rows than it can have something in.

    Raises:
        DataError: the text has the numbers.
    """
    if rows > size * _MAX_ROWS_PER_BYTE + _FREE_ROWS:
        raise _damaged(path, f"it claims {rows:,} rows in {size:,} bytes")


def opened_by_arrow(file: SourceFile) -> Any:
    """The path of a local file, which pyarrow opens itself, or a stream of any other, as pyarrow takes it."""
    return file.stream() if is_remote(file.name) else file.name


def check_footer(path: str) -> None:
    """Checks the end of a file, before pyarrow reads its footer.

    Raises:
        DataError: the footer is missing, encrypted or too large.
    """
    with open_source(path) as file:
        _check_footer(file)


def _check_footer(file: SourceFile) -> None:
    path, size = file.name, file.size
    tail = file.pread(8, max(0, size - 8))
    if tail[4:] == b"PARE":
        raise DataError(f"{path} is encrypted Parquet; write it without encryption")
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length + 12 > size:
        raise _damaged(path, "its footer is missing")
    if length > MAX_FOOTER_BYTES:
        raise _damaged(path, f"its footer has {length:,} bytes, over {MAX_FOOTER_BYTES:,}")


def _damaged(path: str, why: str) -> DataError:
    return DataError(f"{path} is damaged Parquet ({why}); copy or write it again")
