"""Walks through the headers of a tar: names, kinds, offsets and sizes of its members, without reading their contents.

Nothing is extracted and no name is opened, so names, links and devices of a hostile tar have no effect. Read are ustar,
the long names of GNU tar and the ``path`` and ``size`` of PAX, as GNU tar, Python and WebDataset write them.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from neo_megatron.storage.source_files import SourceFile

BLOCK = 512
# Contents of an extended header or a long name; a name on Linux has at most 4,096 bytes.
MAX_EXTENDED_BYTES = 1 << 20
_ZEROS_AT_ONCE = 1 << 20
_REGULAR = b"\0" + b"07"
_KINDS = {
    ord("1"): "a hard link",
    ord("2"): "a symbolic link",
    ord("3"): "a device",
    ord("4"): "a device",
    ord("5"): "a directory",
    ord("6"): "a FIFO",
    ord("S"): "a sparse file",
}


class BrokenTar(Exception):
    """The tar cannot be read from here on; the text says why.

    Attributes:
        is_after_end: whether the archive itself is complete.
    """

    is_after_end = False


class Member(NamedTuple):
    """A member of a tar.

    Args:
        name: a label; bytes that are not UTF-8 are escaped.
        kind: "" for a regular file, else what it is, such as "a symbolic link".
        begin: offset of its first header.
        offset: of its contents.
        size: of its contents, in bytes.
        end: offset of the header after it.
    """

    name: str
    kind: str
    begin: int
    offset: int
    size: int
    end: int


def members(file: SourceFile, start: int = 0) -> Iterator[Member]:
    """The members from a header on, to the end of the archive.

    Args:
        file: the open tar.
        start: offset of a header.

    Raises:
        BrokenTar: after the last member before the damage.
    """
    length = file.size
    place = start
    while place < length:
        header = file.pread(BLOCK, place)
        if header.startswith(b"\0") and header.count(0) == len(header):
            _check_rest(file, place, length)
            return
        member = _member(file, header, place, length)
        if member is None:  # a header for all members after it, in which tools keep comments
            place += BLOCK + _padded(_number(header[124:136]))
            continue
        yield member
        place = member.end


def _member(file: SourceFile, header: bytes, begin: int, length: int) -> Member | None:
    """The member that begins with a header, after the extended headers in front of it; ``None`` for a global header."""
    name: bytes | None = None
    size: int | None = None
    kind, place = "", begin
    while True:
        _check(header)
        flag, stated = header[156], _number(header[124:136])
        if flag not in b"LKxXg":
            break
        body = _body(file, place + BLOCK, stated, length)
        if flag == ord("g"):
            if place != begin:
                raise BrokenTar("a global header stands between a member and its extended header")
            if {b"path", b"size"} & _records(body).keys():
                raise BrokenTar("a global header states a path or a size of members")
            return None
        if flag == ord("L"):
            name = body.rstrip(b"\0")
        elif flag in b"xX":
            records = _records(body)
            name = records.get(b"GNU.sparse.name", records.get(b"path", name))
            size = _decimal(records[b"size"]) if b"size" in records else size
            kind = "a sparse file" if any(key.startswith(b"GNU.sparse.") for key in records) else kind
        place += BLOCK + _padded(stated)
        header = file.pread(BLOCK, place)
    plain = _own_name(header)
    name = plain if name is None else name
    kind = kind or ("" if flag in _REGULAR else _KINDS.get(flag, f"a member of the unknown kind {chr(flag)!r}"))
    if not kind and flag == 0 and name.endswith(b"/"):
        kind = "a directory"  # as tars before POSIX have them
    has_contents = flag in _REGULAR or flag == ord("S") or chr(flag) not in "123456"
    contents = (stated if size is None else size) if has_contents else 0
    offset = place + BLOCK + (_sparse_maps(file, header, place) if flag == ord("S") else 0)
    text = name.decode("utf-8", "backslashreplace")
    if offset + contents > length:
        raise BrokenTar(f"the tar breaks off in the member {text!r:.200}, which has {contents:,} bytes")
    return Member(text, kind, begin, offset, contents, min(offset + _padded(contents), length))


def _check(header: bytes) -> None:
    if len(header) < BLOCK:
        raise BrokenTar("the tar breaks off in the header of a member")
    field = header[148:156]  # counts as spaces
    total = _number(field) + sum(field) - 8 * ord(" ")
    # The low half of Adler-32 is the sum of all bytes, plus 1, by this modulus; it is ten times faster than sum().
    if (total + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
        raise BrokenTar("the header of this member is damaged: its checksum differs")


def _number(field: bytes) -> int:
    """A number of a header: octal, or binary as GNU tar writes large ones."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits.isdigit() or digits.strip(b"01234567"):
        if digits:
            raise BrokenTar("the header of this member is damaged: a number in it is not octal")
        return 0
    return int(digits, 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise BrokenTar("the extended header of this member is damaged: its size is not a number")
    return int(digits)


def _own_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _body(file: SourceFile, offset: int, size: int, length: int) -> bytes:
    if size > MAX_EXTENDED_BYTES:
        raise BrokenTar(f"an extended header has {size:,} bytes, over {MAX_EXTENDED_BYTES:,}")
    if offset + size > length:
        raise BrokenTar("the tar breaks off in an extended header")
    return file.pread(size, offset)


def _records(body: bytes) -> dict[bytes, bytes]:
    r"""The records of an extended header, each "LENGTH KEY=VALUE\\n"."""
    found: dict[bytes, bytes] = {}
    place = 0
    while place < len(body) and body[place]:
        digits, space, _ = body[place : place + 8].partition(b" ")
        size = int(digits) if space and digits.isdigit() else 0
        record = body[place : place + size]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < size or not equals or not record.endswith(b"\n"):
            raise BrokenTar("the extended header of this member is damaged")
        found[key] = value
        place += size
    return found


def _sparse_maps(file: SourceFile, header: bytes, place: int) -> int:
    """Bytes of the maps between the header of a sparse file of GNU tar and its contents."""
    size, more = 0, header[482]
    while more:
        size += BLOCK
        block = file.pread(BLOCK, place + size)
        if len(block) < BLOCK:
            raise BrokenTar("the tar breaks off in the header of a member")
        more = block[504]
    return size


def _check_rest(file: SourceFile, place: int, length: int) -> None:
    """Checks that only zeros follow the end of the archive."""
    while place < length:
        block = file.pread(_ZEROS_AT_ONCE, place)
        if not block:
            return
        if block.count(0) != len(block):
            error = BrokenTar("the archive ends, but the file continues; give each archive in a file of its own")
            error.is_after_end = True
            raise error
        place += len(block)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
