"""Decompresses JSON annotations from start to end, once, and keeps only the text of records that are not yet taken.

A compressed file cannot be read from its middle, so whoever looks for the bounds of records takes their text too.
"""

import gzip
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from neo_megatron.data.prepare.file_kinds import FileKind
from neo_megatron.data.prepare.record_bounds import BLOCK_BYTES, MAX_RECORD_BYTES, WHITESPACE

# The text that is kept while a record is looked for; the beginning of a longer record is forgotten.
_KEPT_BYTES = MAX_RECORD_BYTES + 4 * BLOCK_BYTES
DAMAGE = (EOFError, OSError, zlib.error)


class CompressedText:
    """The decompressed `Text` of a file, of which a window is kept: from `release` to what was last read.

    Args:
        file: open for reading.
        kind: gzip or Zstandard.
    """

    def __init__(self, file: BinaryIO, kind: FileKind) -> None:
        self._file = file
        self._stream = decompressed(file, kind)
        self.name = str(file.name)
        self.broken = ""
        self.size = 0
        self._window = bytearray()
        self._low = 0  # offset of the first byte of the window
        self._not_blank = -1  # offset of the last byte before the window that is not white space
        self._is_at_end = False

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the file that were read."""
        return self._file.tell()

    def blocks(self, start: int, size: int) -> Iterator[tuple[int, bytes]]:
        """As of `Text`; what was released is not repeated."""
        while True:
            while start >= self.size and not self._is_at_end:
                self._read(size)
                if start > self.size:
                    self._drop(self.size)  # the text of slices that an earlier run has finished
            if start >= self.size:
                return
            begin = max(start, self._low)
            block = bytes(self._window[begin - self._low : begin - self._low + size])
            yield begin, block
            start = begin + len(block)

    def is_blank(self, begin: int, end: int) -> bool:
        """As of `Text`; known for released text too."""
        if begin <= self._not_blank:
            return False
        return not self._window[max(begin - self._low, 0) : max(end - self._low, 0)].strip(WHITESPACE)

    def take(self, begin: int, end: int) -> bytes | None:
        """The text of a record; ``None`` above `MAX_RECORD_BYTES`."""
        if end - begin > MAX_RECORD_BYTES:
            return None
        return bytes(self._window[begin - self._low : end - self._low])

    def release(self, offset: int) -> None:
        """Forgets the text before an offset."""
        self._drop(offset)

    def _read(self, size: int) -> None:
        """Reads the next block. Half a record that a damaged file ends with is not given to the reader."""
        block = b""
        try:
            block = read_fully(self._stream, size)
        except DAMAGE as error:
            self.broken = f"the compressed file is damaged or cut off here ({' '.join(str(error).split())})"
        self._is_at_end = not block
        self._window += block
        self.size += len(block)
        if len(self._window) > _KEPT_BYTES:
            self._drop(self.size - _KEPT_BYTES)

    def _drop(self, offset: int) -> None:
        count = offset - self._low
        if count <= 0:
            return
        left = self._window[:count].rstrip(WHITESPACE)
        self._not_blank = self._low + len(left) - 1 if left else self._not_blank
        del self._window[:count]
        self._low = offset


def read_fully(stream: Any, size: int) -> bytes:
    """The next bytes of a stream: less than ``size`` only at its end, or in front of damage.

    Raises:
        EOFError, OSError, zlib.error: the damage is at the first of these bytes.
    """
    parts: list[bytes] = []
    while size:
        try:
            part = stream.read(size)
        except DAMAGE:
            if parts:
                break
            raise
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def decompressed(file: BinaryIO, kind: FileKind) -> Any:
    """A stream of the decompressed bytes, whose ``read`` takes no more memory than it is asked for."""
    if kind is FileKind.GZIP:
        return gzip.GzipFile(fileobj=file, mode="rb")
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")
