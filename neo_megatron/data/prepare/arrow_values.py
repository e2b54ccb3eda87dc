"""Turns Arrow record batches, of Arrow files and of Parquet, into records of plain Python values and stored files.

Bytes, and Hugging Face's ``{bytes, path}``, become a `StoredFile`, alone or in lists; ``{bytes, path}`` without bytes
becomes the path. Dates, times and decimals become text. What has no form in JSON rejects the records that have it.
"""

from collections.abc import Iterator
from typing import Any

from neo_megatron.data.prepare.record_bounds import MAX_RECORD_BYTES
from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.errors import Reason, RejectedSample

_MAX_DEPTH = 32


class _NoForm(Exception):
    """A type has no form in JSON; the text is the type."""


def records_of(batch: Any, container: str, is_valid: bool = True) -> Iterator[dict[str, Any] | RejectedSample]:
    """A record, or why it is rejected, for each row of a batch.

    Args:
        batch: a ``pyarrow.RecordBatch``.
        container: its file, for the files in it.
        is_valid: whether its offsets are known to stay in its memory.
    """
    import pyarrow

    errors = (
        RejectedSample,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
        KeyError,
        pyarrow.ArrowException,
    )
    try:
        if not is_valid:
            batch.validate(full=True)
        yield from _records(batch, container)
    except errors as error:
        if len(batch) == 1:
            yield _rejected(error)
            return
        for row in range(len(batch)):  # the other rows may be usable
            yield from records_of(batch.slice(row, 1), container, is_valid)


def _rejected(error: Exception) -> RejectedSample:
    if isinstance(error, RejectedSample):
        return error
    return RejectedSample(Reason.UNREADABLE_RECORD, f"the row cannot be read ({reason_of(error)})")


def reason_of(error: Exception) -> str:
    """The text of an exception of pyarrow or Python in one line, else its type."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def _records(batch: Any, container: str) -> list[dict[str, Any]]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RejectedSample(Reason.MALFORMED, f"the file has the column {twice!r:.80} twice; rename one")
    columns = [_column(batch.column(number), name, container) for number, name in enumerate(names)]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _column(array: Any, name: str, container: str) -> list[Any]:
    try:
        return _values(array, StoredFile(container, name), 0)
    except _NoForm as error:
        if array.null_count == len(array):
            return [None] * len(array)
        raise RejectedSample(
            Reason.UNSUPPORTED_KEY,
            f"the column {name!r:.80} has the type {error!s:.80}, which is not read; leave it out",
        ) from error


def _values(array: Any, label: StoredFile, depth: int) -> list[Any]:
    """The values of an array; ``label`` names the stored files in it."""
    import pyarrow.compute
    import pyarrow.types as types

    kind = array.type
    if depth > _MAX_DEPTH:
        raise _NoForm(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _values(array.storage, label, depth + 1)
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode(), label, depth + 1)
    if types.is_run_end_encoded(kind):
        return _values(pyarrow.compute.run_end_decode(array), label, depth + 1)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or _is_view(kind):
        return [None if data is None else StoredFile(label.container, label.name, data) for data in array.to_pylist()]
    if types.is_struct(kind):
        return _structs(array, label, depth)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(array, label, depth)
    if types.is_string_view(kind):
        array = array.cast(pyarrow.large_string())
    if array.nbytes > MAX_RECORD_BYTES:
        raise RejectedSample(
            Reason.OVER_LONG,
            f"the column {label.name!r:.80} has over {MAX_RECORD_BYTES >> 20} MiB in this row, too much for text",
        )
    if types.is_timestamp(kind):
        array = array.cast(pyarrow.timestamp(kind.unit))  # UTC: a machine may not know the time zone
    if types.is_temporal(kind) or types.is_decimal(kind):
        return array.cast(pyarrow.string()).to_pylist()
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    if is_number or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return array.to_pylist()
    raise _NoForm(str(kind))


def _is_view(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary_view(kind)


def _structs(array: Any, label: StoredFile, depth: int) -> list[Any]:
    names = [array.type.field(number).name for number in range(array.type.num_fields)]
    fields = [_values(field, label, depth + 1) for field in array.flatten()]
    is_there = array.is_valid().to_pylist()
    if sorted(names) == ["bytes", "path"]:
        data, paths = (fields[names.index(name)] for name in ("bytes", "path"))
        return [
            _image(*pair) if there else None
            for there, pair in zip(is_there, zip(data, paths, strict=True), strict=True)
        ]
    rows = zip(*fields, strict=True) if fields else [()] * len(array)
    return [dict(zip(names, row, strict=True)) if there else None for there, row in zip(is_there, rows, strict=True)]


def _image(data: Any, path: Any) -> Any:
    """Hugging Face's form of an image: its bytes under a label, or else a path."""
    if not isinstance(data, StoredFile):
        return path if data is None else {"bytes": data, "path": path}
    return StoredFile(data.container, path, data.data) if isinstance(path, str) and path else data


def _lists(array: Any, label: StoredFile, depth: int) -> list[Any]:
    flat = _values(array.flatten(), label, depth + 1)
    found, begin = [], 0
    for length in array.value_lengths().to_pylist():
        found.append(None if length is None else flat[begin : begin + length])
        begin += length or 0
    return found
