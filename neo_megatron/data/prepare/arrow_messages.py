"""Finds the messages of an Arrow file or stream: how many rows each record batch has, without reading its rows.

An object cannot be mapped as a local file is. With the places of its messages, a record batch in the middle is read
alone. A file begins with a stream, after its magic bytes, so both are read alike.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from neo_megatron.storage.source_files import SourceFile

_CONTINUES = b"\xff\xff\xff\xff"
_FILE_MAGIC = b"ARROW1\0\0"
_MAX_METADATA_BYTES = 64 << 20
_MAX_MESSAGES = 1 << 20


class MessageKind(IntEnum):
    """The kinds of messages that streams have, as Arrow numbers them."""

    SCHEMA = 1
    DICTIONARY = 2
    RECORDS = 3


class Message(NamedTuple):
    """A message.

    Args:
        kind: of it.
        begin: offset of its first byte.
        end: offset of the byte after its last.
        rows: of a record batch; 0 for others.
    """

    kind: MessageKind
    begin: int
    end: int
    rows: int


class BrokenMessages(Exception):
    """The messages cannot be followed from here on; the text says why."""


def messages(file: SourceFile) -> Iterator[Message]:
    """The messages from the start of a file or stream to its end.

    Raises:
        BrokenMessages: after the last message before the damage.
    """
    place = len(_FILE_MAGIC) if file.pread(len(_FILE_MAGIC), 0) == _FILE_MAGIC else 0
    count = 0
    while place < file.size:
        count += 1
        if count > _MAX_MESSAGES:
            raise BrokenMessages(f"it has over {_MAX_MESSAGES:,} messages; write larger record batches")
        head = file.pread(8, place)
        prefix = 8 if head.startswith(_CONTINUES) else 4  # streams of before 2019 have no mark
        length = int.from_bytes(head[prefix - 4 : prefix], "little")
        if len(head) < prefix or length > _MAX_METADATA_BYTES:
            raise BrokenMessages(f"the header of a message states {length:,} bytes of metadata")
        if not length:
            return
        metadata = file.pread(length, place + prefix)
        try:
            kind, body, rows = _parsed(metadata)
        except (struct.error, ValueError) as error:
            raise BrokenMessages(f"the metadata of a message are damaged ({error})") from error
        end = place + prefix + length + body
        if len(metadata) < length or end > file.size:
            raise BrokenMessages(f"a message of {end - place:,} bytes is cut off")
        yield Message(kind, place, end, rows)
        place = end


def _parsed(metadata: bytes) -> tuple[MessageKind, int, int]:
    """(kind, bytes of the body, rows) in the flatbuffer of a message."""
    table = _unsigned("<I", metadata, 0)
    kind = MessageKind(_unsigned("<B", metadata, _field(metadata, table, 1)))
    body_field = _field(metadata, table, 3)
    body = _unsigned("<q", metadata, body_field) if body_field else 0
    rows = 0
    if kind is MessageKind.RECORDS:
        header = _field(metadata, table, 2)
        batch = header + _unsigned("<I", metadata, header)
        length = _field(metadata, batch, 0)
        rows = _unsigned("<q", metadata, length) if length else 0
    return kind, body, rows


def _field(data: bytes, table: int, number: int) -> int:
    """Offset of a field of a table in a flatbuffer; 0 if it has its default."""
    (back,) = struct.unpack_from("<i", data, table)
    layout = table - back
    if layout < 0 or 4 + 2 * number >= _unsigned("<H", data, layout):
        return 0
    offset = _unsigned("<H", data, layout + 4 + 2 * number)
    return table + offset if offset else 0


def _unsigned(form: str, data: bytes, offset: int) -> int:
    (value,) = struct.unpack_from(form, data, offset)
    if value < 0:
        raise ValueError("a size is negative")
    return value
