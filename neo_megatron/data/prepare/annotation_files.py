"""Recognises annotation files that are not read, or do not fit their name, before records are read from them."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neo_megatron.data.prepare.compressed import DAMAGE, decompressed, read_fully
from neo_megatron.data.prepare.file_kinds import (
    COMPRESSED,
    FileKind,
    check_readable,
    compressed_suffix,
    has_lines,
    kind_of_bytes,
    kind_of_file,
)
from neo_megatron.data.prepare.parquet_records import check_footer
from neo_megatron.errors import DataError
from neo_megatron.storage.open import open_source

# A file is checked by its head; a first record that is longer is checked when it is read.
_HEAD_BYTES = 1 << 20
# (offset, magic bytes, kind of file, remedy).
_MAGIC = (
    (0, b"BZh", "compressed with bzip2", "unpack it with: bunzip2"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "unpack it with: unxz"),
    (0, b"\x04\x22\x4d\x18", "compressed with LZ4", "unpack it with: lz4 -d"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it with: unzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with: 7z x"),
    (0, b"SQLite format 3\0", "an SQLite database", "write its records as JSON lines: those of"),
    (0, b"\x89HDF", "HDF5", "write its records as JSON lines: those of"),
    (0, b"Obj\x01", "Avro", "write its records as JSON lines: those of"),
    (0, b"\x93NUMPY", "a NumPy array", "write its records as JSON lines: those of"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file", "fetch it with: git lfs pull --include"),
)
# UTF-32 first: its little-endian byte order mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONVERT = "write one record a line into a .jsonl file, or a JSON array of records into a .json file"


def check_annotation_file(path: str) -> None:
    """Rejects a file that is not read, or JSON that does not fit its name: a record a line in .jsonl, else one array.

    Only files that are wrong as a whole are rejected here; broken records are left to the reader of records.

    Raises:
        DataError: the text says what the file is, and what to do.
    """
    kind = kind_of_file(path)
    check_readable(path, kind)
    if kind is FileKind.PARQUET:
        check_footer(path)
    if kind is FileKind.JSON or kind in COMPRESSED:
        _check_json(path, kind)


def _check_json(path: str, kind: FileKind) -> None:
    head = next(_blocks(path, kind), b"")
    is_complete = len(head) < _HEAD_BYTES
    inner = kind_of_bytes(head)
    if kind in COMPRESSED and inner is not FileKind.JSON:
        program = "gunzip" if kind is FileKind.GZIP else "zstd -d"
        raise DataError(f"{path} is {inner} in a compressed file; decompress it with: {program} {path}")
    for offset, magic, what, remedy in _MAGIC:
        if head[offset:].startswith(magic):
            raise DataError(f"{path} is {what}; {remedy} {path}")
    if encoding := _wide_encoding(head):
        raise DataError(f"{path} is {encoding}; convert it: iconv -f {encoding} -t UTF-8 {path} > utf8{_suffix(path)}")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not text:
        if is_complete:
            raise DataError(f"{path} is empty; {_CONVERT}")
        return
    lines = _Lines(path, kind, text, is_complete)
    sentence = _not_lines(lines) if has_lines(path) else _not_array(lines)
    if sentence:
        raise DataError(f"{path} {sentence}")


def _blocks(path: str, kind: FileKind) -> Iterator[bytes]:
    """The text of a file, decompressed.

    Raises:
        DataError: it cannot be decompressed from its start; later damage ends the text.
    """
    with open_source(path) as file:
        text = decompressed(file.stream(), kind) if kind in COMPRESSED else file.stream()
        is_first = True
        try:
            while block := read_fully(text, _HEAD_BYTES):
                yield block
                is_first = False
        except DAMAGE as error:
            if is_first and kind in COMPRESSED:
                why = " ".join(str(error).split())
                raise DataError(f"{path} is {kind}, but damaged ({why}); copy or compress it again") from error


def _suffix(path: str) -> str:
    return Path(path).suffix


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32, by its byte order mark or by the zero bytes of JSON characters; "" for anything else."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    start = head[:4].ljust(4, b"x")
    zeros = "".join("0" if byte == 0 else "x" for byte in start)
    return {"000x": "UTF-32BE", "x000": "UTF-32LE", "0x0x": "UTF-16BE", "x0x0": "UTF-16LE"}.get(zeros, "")


class _Lines:
    """The first two lines that are not blank, as far as they are in the head of a file.

    Args:
        path: of the file.
        kind: of the file.
        text: its head, from the first character that is not white space.
        is_complete: whether the head reaches to the end of the file.
    """

    def __init__(self, path: str, kind: FileKind, text: bytes, is_complete: bool) -> None:
        first, ended, rest = text.partition(b"\n")
        rest = rest.lstrip(b" \t\r\n")
        second, _, _ = rest.partition(b"\n")
        self.text, self.is_complete = text, is_complete
        self.packed = compressed_suffix(path)
        self.mark = text[:1]
        self.first, self.second = first.strip(), second.strip()
        self.begins = repr(self.first[:40].decode(errors="backslashreplace"))
        self.is_single = is_complete and not rest
        if not ended and not is_complete:
            self.is_single = self.mark == b"[" and _is_one_line(path, kind)

    @property
    def second_is_value(self) -> bool:
        return _value(self.second) is not _BROKEN


_BROKEN = object()


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _BROKEN


def _is_unfinished(line: bytes) -> bool:
    """Whether a line could be the first of a JSON value that spans several lines."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _is_one_line(path: str, kind: FileKind) -> bool:
    """Whether only white space follows the first line of a file, which is long."""
    found = False
    for block in _blocks(path, kind):
        _, newline, rest = (b"", b"\n", block) if found else block.partition(b"\n")
        found = bool(newline)
        if found and rest.strip():
            return False
    return True


def _not_lines(lines: _Lines) -> str:
    """Why a file is not one record a line; "" if it may be."""
    value = _value(lines.first)
    spans_lines = not lines.is_single and _is_unfinished(lines.first) and not lines.second_is_value
    if lines.mark == b"[":
        is_array = lines.first == b"[" or spans_lines or (lines.is_single and value is not _BROKEN)
        is_array |= lines.is_single and not lines.is_complete
        return f"is one JSON array; rename it to .json{lines.packed}, or write one record a line" if is_array else ""
    if lines.mark == b"{":
        if lines.is_single and isinstance(value, dict):
            return _wrapped(value)
        return "has JSON objects that span several lines; write one a line, as with: jq -c ." if spans_lines else ""
    if value is _BROKEN and not lines.second_is_value:
        return f"is not JSON: it begins with {lines.begins}; {_CONVERT}"
    return ""


def _not_array(lines: _Lines) -> str:
    """Why a file is not one JSON array; "" if it may be."""
    value = _value(lines.first)
    has_lines = value is not _BROKEN and not lines.is_single and bool(lines.second)
    if lines.mark == b"[":
        return (
            f"has one record a line; rename it to .jsonl{lines.packed}" if has_lines and lines.second_is_value else ""
        )
    if lines.mark != b"{":
        return f"is not a JSON array: it begins with {lines.begins}; {_CONVERT}"
    if has_lines:
        return f"is not a JSON array: it has one record a line; rename it to .jsonl{lines.packed}"
    contents = _value(lines.text) if lines.is_complete else None
    wrapped = _wrapped(contents) if isinstance(contents, dict) else ""
    return wrapped or "is one JSON object, not an array; write only the list of records, or put one record in [ ]"


def _wrapped(value: dict[str, Any]) -> str:
    """How one object holds all records, under a key or by their ids; "" for an object that may be a record."""
    if "conversations" in value or "content" in value:  # whose typed parts look like records
        return ""
    for key, records in value.items():
        if isinstance(records, list) and records and all(map(_is_record, records)):
            how = f"jq '.[{json.dumps(key)}]'"
            return f"is one JSON object with the list of records under {key!r}; write only that list, as with: {how}"
    if value and all(map(_is_record, value.values())):
        return "is one JSON object with a record under each key; write a list of its values, as with: jq '[.[]]'"
    return ""


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"conversations", "messages", "image", "images", "text"})
