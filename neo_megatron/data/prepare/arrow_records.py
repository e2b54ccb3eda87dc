"""Reads the rows of an Arrow file or stream as records, as ``save_to_disk`` of Hugging Face datasets writes them.

The file is mapped, so a record batch takes memory only for the rows that are used.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.prepare.arrow_values import reason_of, records_of
from neo_megatron.data.prepare.file_kinds import FileKind
from neo_megatron.data.prepare.parquet_records import check_rows, opened_by_arrow, row_bounds
from neo_megatron.data.prepare.record_bounds import Bounds
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.source_files import SourceFile

_BATCH_ROWS = 64  # that become Python values together


class ArrowRows:
    """The rows of an Arrow file or stream.

    Args:
        file: open for reading.
        kind: file or stream.

    Raises:
        DataError: it is damaged at its start.
    """

    def __init__(self, file: SourceFile, kind: FileKind) -> None:
        import pyarrow

        self._file, self._path, self._kind = file, file.name, kind
        self._size = file.size
        self._errors = (pyarrow.ArrowException, OSError, MemoryError, ValueError)
        self.bytes_per_row = 0.0
        self._open()

    def bounds(self, start: int) -> Bounds:
        """Row numbers from ``start`` on, and the numbers after them, as batches are found."""
        rows = 0
        for batch in self._batches():
            if isinstance(batch, str):
                return batch
            before, rows = rows, rows + len(batch)
            check_rows(self._path, rows, self._size)
            self.bytes_per_row = self.bytes_per_row or batch.nbytes / max(1, len(batch))
            yield from row_bounds(max(start, before), rows)
        return ""

    def read(self, rows: Iterable[int]) -> Iterator[dict[str, Any] | RejectedSample]:
        """The record, or why it is rejected, of each of these rows in ascending order."""
        waiting = iter(rows)
        row = next(waiting, None)
        first = 0
        for batch in self._batches():
            if row is None:
                return
            if isinstance(batch, str):
                break
            is_valid = self._is_valid(batch) if row < first + len(batch) else True
            while row is not None and row < first + len(batch):
                begin = (row - first) // _BATCH_ROWS * _BATCH_ROWS
                with limited_memory():
                    records = list(records_of(batch.slice(begin, _BATCH_ROWS), self._path, is_valid))
                while row is not None and row < first + begin + len(records):
                    yield records[row - first - begin]
                    row = next(waiting, None)
            first += len(batch)
        while row is not None:
            yield RejectedSample(Reason.UNREADABLE_RECORD, "the file has changed since it was first read")
            row = next(waiting, None)

    def _is_valid(self, batch: Any) -> bool:
        """Whether offsets and texts of a batch are valid; else rows are checked one by one."""
        try:
            batch.validate(full=True)
        except self._errors:
            return False
        return True

    def _open(self) -> Any:
        import pyarrow

        try:
            with limited_memory():
                mapped = opened_by_arrow(self._file) if is_remote(self._path) else pyarrow.memory_map(self._path)
                options = pyarrow.ipc.IpcReadOptions(use_threads=False)
                if self._kind is FileKind.ARROW_FILE:
                    return pyarrow.ipc.open_file(mapped, options=options)
                return pyarrow.ipc.open_stream(mapped, options=options)
        except self._errors as error:
            raise DataError(
                f"{self._path} is damaged Arrow data ({reason_of(error)}); copy or write it again"
            ) from error

    def _batches(self) -> Iterator[Any]:
        """The record batches; at last, if the file is damaged, why as a string."""
        reader = self._open()
        number = 0
        while True:
            try:
                with limited_memory():
                    if self._kind is FileKind.ARROW_FILE:
                        batch = reader.get_batch(number) if number < reader.num_record_batches else None
                    else:
                        batch = next(iter(reader), None)
            except self._errors as error:
                yield f"record batch {number} cannot be read ({reason_of(error)})"
                return
            if batch is None:
                return
            yield batch
            number += 1
