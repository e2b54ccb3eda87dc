"""Reads the rows of an Arrow file or stream as records, as ``save_to_disk`` of Hugging Face datasets writes them.

A local file is mapped, so a record batch takes memory only for the rows that are used. Of an object, those record
batches are read that have rows which are used.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.prepare.arrow_messages import BrokenMessages, Message, MessageKind, messages
from neo_megatron.data.prepare.arrow_values import reason_of, records_of
from neo_megatron.data.prepare.file_kinds import FileKind
from neo_megatron.data.prepare.parquet_records import check_rows, row_bounds
from neo_megatron.data.prepare.record_bounds import Bounds
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.source_files import SourceFile

_BATCH_ROWS = 64  # that become Python values together
# Messages of objects, by address and version, because each slice needs them; and why there are no more.
_known: dict[tuple[str, str], tuple[list[Message], str]] = {}
_MOST_KNOWN = 16


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
            before, rows = rows, rows + batch.rows
            check_rows(self._path, rows, self._size)
            self.bytes_per_row = self.bytes_per_row or batch.size / max(1, batch.rows)
            yield from row_bounds(max(start, before), rows)
        return ""

    def read(self, rows: Iterable[int]) -> Iterator[dict[str, Any] | RejectedSample]:
        """The record, or why it is rejected, of each of these rows in ascending order."""
        waiting = iter(rows)
        row = next(waiting, None)
        first = 0
        for found in self._batches():
            if row is None:
                return
            if isinstance(found, str):
                break
            if row >= first + found.rows:
                first += found.rows
                continue
            batch = self._loaded(found)
            is_valid = self._is_valid(batch) if not isinstance(batch, RejectedSample) else True
            while row is not None and row < first + found.rows:
                if isinstance(batch, RejectedSample):
                    yield batch
                    row = next(waiting, None)
                    continue
                begin = (row - first) // _BATCH_ROWS * _BATCH_ROWS
                with limited_memory():
                    records = list(records_of(batch.slice(begin, _BATCH_ROWS), self._path, is_valid))
                while row is not None and row < first + begin + len(records):
                    yield records[row - first - begin]
                    row = next(waiting, None)
            first += found.rows
        while row is not None:
            yield RejectedSample(Reason.UNREADABLE_RECORD, "the file has changed since it was first read")
            row = next(waiting, None)

    def _loaded(self, found: "_Batch") -> Any:
        """A record batch, or why its rows are rejected."""
        try:
            with limited_memory():
                batch = found.load()
            if len(batch) != found.rows:
                raise ValueError(f"it has {len(batch):,} rows, its metadata say {found.rows:,}")
        except self._errors as error:
            return RejectedSample(Reason.UNREADABLE_RECORD, f"the record batch cannot be read ({reason_of(error)})")
        return batch

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
                mapped = self._file.stream() if is_remote(self._path) else pyarrow.memory_map(self._path)
                options = pyarrow.ipc.IpcReadOptions(use_threads=False)
                if self._kind is FileKind.ARROW_FILE:
                    return pyarrow.ipc.open_file(mapped, options=options)
                return pyarrow.ipc.open_stream(mapped, options=options)
        except self._errors as error:
            raise DataError(
                f"{self._path} is damaged Arrow data ({reason_of(error)}); copy or write it again"
            ) from error

    def _batches(self) -> "Iterator[_Batch | str]":
        """The record batches; at last, if the file is damaged, why as a string."""
        return self._batches_of_object() if is_remote(self._path) else self._mapped_batches()

    def _batches_of_object(self) -> "Iterator[_Batch | str]":
        key = self._path, self._file.version
        if key not in _known:
            _known[key] = self._messages()
            while len(_known) > _MOST_KNOWN:
                _known.pop(next(iter(_known)))
        found, broken = _known[key]
        before: list[Message] = []  # the schema, and dictionaries
        for message in found:
            if message.kind is MessageKind.RECORDS:
                load = partial(self._read_batch, [*before, message])
                yield _Batch(message.rows, message.end - message.begin, load)
            else:
                before.append(message)
        if broken:
            yield f"the record batches cannot be read further ({broken})"

    def _messages(self) -> tuple[list[Message], str]:
        """All messages, and why there are no more of them."""
        found: list[Message] = []
        try:
            for message in messages(self._file):
                found.append(message)
        except BrokenMessages as error:
            return found, str(error)
        return found, ""

    def _read_batch(self, parts: Sequence[Message]) -> Any:
        """The record batch in the last of these messages of a stream."""
        import pyarrow

        data = b"".join(self._file.pread(part.end - part.begin, part.begin) for part in parts)
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        return pyarrow.ipc.open_stream(pyarrow.BufferReader(data), options=options).read_next_batch()

    def _mapped_batches(self) -> "Iterator[_Batch | str]":
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
            yield _Batch(len(batch), batch.nbytes, partial(_mapped, batch))
            number += 1


def _mapped(batch: Any) -> Any:
    return batch


class _Batch(NamedTuple):
    """A record batch that need not be read yet.

    Args:
        rows: of it.
        size: in bytes, about.
        load: reads it.
    """

    rows: int
    size: int
    load: Callable[[], Any]
