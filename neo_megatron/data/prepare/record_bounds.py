"""Finds the bounds of the records in an annotation file from its bytes, without parsing JSON.

In a JSON array every comma at depth 1, outside of strings, separates two records. A block of bytes is reduced to the
positions of its quotes, brackets and commas; running sums over those tell what is within a string, and the depth. It
takes the memory of a block, whatever the length of a record.
"""

from collections.abc import Generator, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from neo_megatron.errors import DataError
from neo_megatron.storage.source_files import SourceFile

BLOCK_BYTES = 1 << 18
# A longer record is not an annotation; it is rejected before it fills the memory.
MAX_RECORD_BYTES = 64 << 20
WHITESPACE = b" \t\r\n"
_QUOTE, _COMMA, _OPEN, _CLOSE = 1, 2, 3, 4
_CLASSES = bytes.maketrans(b'",[{]}', bytes([_QUOTE, _COMMA, _OPEN, _OPEN, _CLOSE, _CLOSE]))
# Class of each byte; 0 for bytes without a meaning here.
_TABLE = bytes(_CLASSES[byte] if byte in b'",[{]}' else 0 for byte in range(256))
_DEPTH_CHANGE = np.array([0, 0, 0, 1, -1], np.int32)

# Yields int64 [n, 2], first byte of each record and the byte after its last; returns why the file breaks off after
# them, or "".
Bounds = Generator[np.ndarray, None, str]


@runtime_checkable
class Text(Protocol):
    """The text of an annotation file, which need not be that of a file on the disk.

    Attributes:
        name: of the file.
        size: bytes of the text; known after the last of its blocks.
        broken: why the text cannot be read to its end; "" if it can, known after the last of its blocks.
    """

    name: str

    @property
    def size(self) -> int: ...

    @property
    def broken(self) -> str: ...

    def blocks(self, start: int, size: int) -> Iterator[tuple[int, bytes]]:
        """(offset, at most ``size`` bytes) from ``start`` to the end."""

    def is_blank(self, begin: int, end: int) -> bool:
        """Whether a range that blocks were read of has only white space."""


class PlainText:
    """The `Text` of an open file."""

    broken = ""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.name = file.name

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    def blocks(self, start: int, size: int) -> Iterator[tuple[int, bytes]]:
        """As of `Text`."""
        while block := self._file.pread(size, start):
            yield start, block
            start += len(block)

    def is_blank(self, begin: int, end: int) -> bool:
        """As of `Text`."""
        while begin < end:
            block = self._file.pread(min(BLOCK_BYTES, end - begin), begin)
            if block.strip(WHITESPACE):
                return False
            begin += len(block)
        return True


def line_bounds(file: SourceFile | Text, start: int = 0, block_bytes: int = BLOCK_BYTES) -> Bounds:
    """Bounds of the lines of a JSONL file from the offset ``start``, where one begins, without blank lines."""
    text, begin = _text(file), start
    for base, block in text.blocks(start, block_bytes):
        ends = base + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        if len(ends):
            yield _without_blank(text, _between(np.append(begin, ends), gap=0), base, block)
            begin = int(ends[-1])
    size = text.size
    if begin < size and not text.broken:
        yield _without_blank(text, np.array([[begin, size]]), size, b"")
    return text.broken


def _text(file: SourceFile | Text) -> Text:
    return file if isinstance(file, Text) else PlainText(file)


def _without_blank(text: Text, lines: np.ndarray, base: int, block: bytes) -> np.ndarray:
    """The lines that are not blank; all but the first begin in the block."""
    firsts = np.frombuffer(block, np.uint8)[lines[1:, 0] - base]
    suspects = np.append(True, np.isin(firsts, np.frombuffer(WHITESPACE, np.uint8)))
    blank = [number for number in np.flatnonzero(suspects) if text.is_blank(*lines[number].tolist())]
    return np.delete(lines, blank, axis=0)


def element_bounds(file: SourceFile | Text, start: int = 0, block_bytes: int = BLOCK_BYTES) -> Bounds:
    """Bounds of the elements of a JSON array, including the white space around them.

    Args:
        file: the annotation file.
        start: 0, or the end of an element, to continue after it.
        block_bytes: read at once.

    Raises:
        DataError: the file does not hold an array.
    """
    text = _text(file)
    first = start or _opening_bracket(text)
    scan = _Scan(depth=1 if start else 0)
    separator = None  # the last comma, or the opening bracket
    for base, block in text.blocks(first, block_bytes):
        separators = base + scan.separators(block)
        if len(separators):
            places = separators if separator is None else np.append(separator, separators)
            bounds = _between(places, gap=1)
            empty = scan.depth == 0 and places[0] == first and not start and len(places) == 2
            if len(bounds) and not (empty and text.is_blank(*bounds[0].tolist())):
                yield bounds
            separator = int(separators[-1])
        if scan.depth == 0:
            return "" if _ends(text, separator + 1, block_bytes) else "the JSON array ends, but the file continues"
    if text.broken:
        return text.broken
    if scan.depth > 1 or scan.in_string:
        return "the JSON array breaks off in the middle of this record"
    if separator is not None and not text.is_blank(separator + 1, text.size):
        yield np.array([[separator + 1, text.size]])
    return "the JSON array breaks off here: it has no closing bracket"


def _ends(text: Text, start: int, block_bytes: int) -> bool:
    """Whether only white space follows."""
    return not any(block.strip(WHITESPACE) for _, block in text.blocks(start, block_bytes)) and not text.broken


class _Scan:
    """The state of a scan through JSON text, from one block to the next."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.in_string = False
        self._escape = False  # whether the next byte follows a backslash that is not itself escaped

    def separators(self, block: bytes) -> np.ndarray:
        """Offsets of the brackets of the array and of the commas between its elements; none after its end."""
        classes = np.frombuffer(bytearray(block.translate(_TABLE)), np.uint8)
        classes[self._escaped(block)] = 0
        places = np.flatnonzero(classes != 0)  # many times faster on booleans than on numbers
        classes = classes[places]
        quotes = classes == _QUOTE
        in_string = np.logical_xor.accumulate(quotes) ^ self.in_string
        self.in_string = bool(in_string[-1]) if len(places) else self.in_string
        outside = np.flatnonzero(~(quotes | in_string))
        places, classes = places[outside], classes[outside]
        depths = self.depth + np.cumsum(_DEPTH_CHANGE[classes])
        closed = np.flatnonzero(depths == 0)
        if len(closed):
            end = int(closed[0]) + 1
            places, classes, depths = places[:end], classes[:end], depths[:end]
        self.depth = int(depths[-1]) if len(places) else self.depth
        return places[(depths == 0) | ((depths == 1) & (classes != _CLOSE))]

    def _escaped(self, block: bytes) -> np.ndarray:
        """Offsets of the bytes that follow an odd number of backslashes."""
        escaped = np.zeros(int(self._escape), np.int64)
        self._escape = False
        if b"\\" not in block:
            return escaped
        slashes = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\\"))
        if len(escaped) and slashes[0] == 0:
            slashes = slashes[1:]
        runs = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
        lengths = np.diff(runs, append=len(slashes))
        after = (slashes[runs] + lengths)[lengths % 2 == 1]
        self._escape = bool(len(after)) and after[-1] == len(block)
        return np.append(escaped, after[: len(after) - self._escape])


def _between(places: np.ndarray, gap: int) -> np.ndarray:
    return np.stack([places[:-1] + gap, places[1:]], axis=1)


def _opening_bracket(text: Text) -> int:
    """Offset of the first character, which must be ``[``; a byte order mark may precede it."""
    for base, block in text.blocks(0, BLOCK_BYTES):
        rest = block.removeprefix(b"\xef\xbb\xbf") if base == 0 else block
        if found := rest.lstrip(WHITESPACE):
            if found.startswith(b"["):
                return base + len(block) - len(found)
            break
    if text.broken:
        raise DataError(f"{text.name}: {text.broken}; copy the file again")
    raise DataError(f"{text.name} does not hold a JSON array; a file with one record a line must be named .jsonl")
