"""References to images that stay where they are: a file, the place of the image's bytes in it, and their CRC-32.

A shard with ``image_store: reference`` holds one for each image, in place of its bytes. The file is a tar or a loose
image, on a disk or in object storage; only regular files are opened, and only to read.
"""

import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neo_megatron.data.image_limits import MAX_FILE_BYTES
from neo_megatron.errors import DataError
from neo_megatron.redaction import has_credentials
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import read_objects
from neo_megatron.storage.source_files import MissingObject, ShorterObject

_HEAD = struct.Struct("<QQI")
_GAP = 1 << 16  # bytes between two images of a file up to which one read for both costs less
_LARGEST_READ = 64 << 20
_MAX_PATH = 4096
_AGAIN = "restore the file, or preprocess again"


class BrokenReference(ValueError):
    """Bytes that are not a reference; the text says what is wrong with them."""


@dataclass(frozen=True)
class Reference:
    """Bytes of a file.

    Args:
        path: of the file, absolute; or its address, without credentials.
        offset: of the first byte.
        length: in bytes.
        crc32: of the bytes, as of `zlib.crc32`.
    """

    path: str
    offset: int
    length: int
    crc32: int

    @classmethod
    def to(cls, path: str, offset: int, data: bytes) -> "Reference":
        """The reference to ``data``, which were read from a file at an offset."""
        return cls(path if is_remote(path) else os.path.abspath(path), offset, len(data), zlib.crc32(data))

    def pack(self) -> np.ndarray:
        """uint8 [n], as it is stored."""
        return np.frombuffer(_HEAD.pack(self.offset, self.length, self.crc32) + os.fsencode(self.path), np.uint8)

    @classmethod
    def unpack(cls, stored: np.ndarray) -> "Reference":
        """The reference in stored bytes, uint8 [n].

        Raises:
            BrokenReference: they are not what `pack` makes, or the image is too large.
        """
        data = stored.tobytes()
        path = data[_HEAD.size :]
        if b"\0" in path or len(path) >= _MAX_PATH or not _is_complete(os.fsdecode(path)):
            raise BrokenReference("a reference to an image has neither an absolute path nor an address")
        offset, length, crc32 = _HEAD.unpack_from(data)
        if length > MAX_FILE_BYTES or offset > 1 << 62:
            raise BrokenReference(f"a reference is to {length:,} bytes from {offset:,} on, more than an image may have")
        return cls(os.fsdecode(path), offset, length, crc32)


def _is_complete(path: str) -> bool:
    """Whether a path is absolute, or an address of an object without credentials, ``.`` and ``..``."""
    if not is_remote(path):
        return path.startswith("/")
    parts = path.split("/")[2:]
    return len(parts) > 1 and not {"", ".", ".."} & set(parts) and not has_credentials(path)


def read_references(references: Sequence[Reference]) -> list[np.ndarray]:
    """The bytes of images, uint8 [length] each; neighbours in a file are read together, and files in advance.

    Ranges of objects are requested concurrently.

    Raises:
        DataError: a file is missing, not a regular file, or has changed since.
    """
    by_file: dict[str, list[int]] = {}
    remote: list[int] = []
    for number, reference in enumerate(references):
        if is_remote(reference.path):
            remote.append(number)
        else:
            by_file.setdefault(reference.path, []).append(number)
    found: dict[int, np.ndarray] = {}
    opened: list[tuple[str, int]] = []
    try:
        for path, numbers in by_file.items():
            opened.append((path, _open(path)))
            for number in numbers:  # the disk is busy with all of them while the first is read
                reference = references[number]
                os.posix_fadvise(opened[-1][1], reference.offset, reference.length, os.POSIX_FADV_WILLNEED)
        if remote:
            _read_objects(references, remote, found)
        for path, file in opened:
            for part in _together(references, by_file[path]):
                _read_part(references, part, path, file, found)
    finally:
        for _, file in opened:
            os.close(file)
    return [found[number] for number in range(len(references))]


def _read_objects(references: Sequence[Reference], numbers: Sequence[int], found: dict[int, np.ndarray]) -> None:
    wanted = [references[number] for number in numbers]
    try:
        parts = read_objects([(reference.path, reference.offset, reference.length) for reference in wanted])
    except (MissingObject, ShorterObject) as error:
        raise DataError(f"an object that has images of the data set has changed: {error}; {_AGAIN}") from error
    for number, reference, part in zip(numbers, wanted, parts, strict=True):
        _check(reference, part)
        found[number] = part


def _check(reference: Reference, data: bytes | np.ndarray) -> None:
    if len(data) < reference.length or zlib.crc32(data) != reference.crc32:
        raise DataError(
            f"{reference.path} has changed since the data set refers to it: the {reference.length:,} bytes at "
            f"{reference.offset:,} are other ones; {_AGAIN}"
        )


def _open(path: str) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer
    except OSError as error:
        raise DataError(
            f"{path}, which has images of the data set, cannot be read ({error.strerror}); {_AGAIN}"
        ) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise DataError(f"{path}, which has images of the data set, is not a regular file; {_AGAIN}")
    return file


def _together(references: Sequence[Reference], numbers: Sequence[int]) -> list[list[int]]:
    """The references to a file, in order of their offsets, in groups that are read at once."""
    groups: list[list[int]] = []
    start = end = 0
    for number in sorted(numbers, key=lambda number: references[number].offset):
        reference = references[number]
        last = reference.offset + reference.length
        if groups and reference.offset - end <= _GAP and last - start <= _LARGEST_READ:
            groups[-1].append(number)
            end = max(end, last)
        else:
            groups.append([number])
            start, end = reference.offset, last
    return groups


def _read_part(
    references: Sequence[Reference], part: Sequence[int], path: str, file: int, found: dict[int, np.ndarray]
) -> None:
    start = references[part[0]].offset
    end = max(references[number].offset + references[number].length for number in part)
    try:
        data = os.pread(file, end - start, start)
    except OSError as error:
        raise DataError(f"{path} cannot be read at {start:,} ({error.strerror}); {_AGAIN}") from error
    for number in part:
        reference = references[number]
        own = data[reference.offset - start : reference.offset - start + reference.length]
        _check(reference, own)
        found[number] = np.frombuffer(own, np.uint8)
