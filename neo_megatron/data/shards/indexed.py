"""Writes and reads Megatron's ``.bin`` / ``.idx`` pairs: sequences of numbers, and the offset of each.

Only NumPy is needed, so that workers need not import torch; ``megatron.core.datasets.indexed_dataset`` opens the same
files. ``docs/shard_format.md`` describes their bytes.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.atomic_files import AtomicFile, write_atomically
from neo_megatron.errors import DamagedFile, damaged_file
from neo_megatron.storage.base import Content, Range

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}


class SequenceWriter:
    """Writes ``{prefix}.bin`` while sequences are added, and ``{prefix}.idx`` at the end."""

    def __init__(self, prefix: Path, dtype: type) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._bin = AtomicFile(_file(prefix, "bin"))
        self._lengths: list[int] = []
        self._documents = [0]

    def add(self, sequence: np.ndarray) -> None:
        """Appends one sequence, [n] of the writer's type."""
        if sequence.dtype != self._dtype:
            raise TypeError(f"{self._prefix} holds {self._dtype}, not {sequence.dtype}")
        self._bin.write(np.ascontiguousarray(sequence))
        self._lengths.append(sequence.size)

    def end_document(self) -> None:
        """Ends the document of the sequences since the last call."""
        self._documents.append(len(self._lengths))

    def commit(self) -> dict[str, dict[str, Any]]:
        """Makes both files appear under their names; returns their entries in a manifest."""
        lengths = np.array(self._lengths, np.int64)
        offsets = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        header = _HEADER.pack(_MAGIC, 1, _CODES[self._dtype], len(lengths), len(self._documents))
        documents = np.array(self._documents, np.int64)
        index = header + lengths.astype(np.int32).tobytes() + offsets.tobytes() + documents.tobytes()
        files = [_file(self._prefix, "bin"), _file(self._prefix, "idx")]
        return {files[0].name: self._bin.commit(), files[1].name: write_atomically(files[1], index)}

    def discard(self) -> None:
        """Removes the unfinished file."""
        self._bin.discard()


class SequenceReader:
    """The sequences of a pair of files. The index is mapped; data are read on access.

    Attributes:
        lengths: int32 [sequences].
        documents: int64 [documents + 1], first sequence of each document, and the number of sequences.

    Args:
        name: of the pair, for messages.
        index: uint8 [n], the ``.idx``.
        data: the ``.bin``.
        dtype: of the numbers.
        count: number of sequences according to the manifest.
        documents: number of documents according to the manifest, if that has it.

    Raises:
        DamagedFile: the index is not valid, or has other numbers of sequences or documents.
    """

    def __init__(
        self, name: str, index: np.ndarray, data: Content, dtype: type, count: int, documents: int | None = None
    ) -> None:
        self._name, self._data, self._dtype = name, data, np.dtype(dtype)
        if len(index) < _HEADER.size:
            raise self._damaged("idx", "it is shorter than its header")
        magic, version, code, sequences, starts = _HEADER.unpack_from(index)
        size = _HEADER.size + 12 * sequences + 8 * starts
        if (magic, version, code, size) != (_MAGIC, 1, _CODES[self._dtype], len(index)) or not starts:
            raise self._damaged("idx", "its header does not fit the file")
        if sequences != count or documents not in (None, starts - 1):
            expected = f"{count} sequences" if documents is None else f"{count} sequences in {documents} documents"
            raise self._damaged("idx", f"it has {sequences} sequences in {starts - 1} documents, not {expected}")
        self.lengths = np.frombuffer(index, np.int32, sequences, _HEADER.size)
        self._offsets = np.frombuffer(index, np.int64, sequences, _HEADER.size + 4 * sequences)
        self.documents = np.frombuffer(index, np.int64, starts, _HEADER.size + 12 * sequences)

    def check(self) -> None:
        """Checks all of the index, most of which is not read when it is opened.

        Raises:
            DamagedFile: sequences do not follow one another to the end of the ``.bin``, or documents are not in order.
        """
        ends = np.cumsum(self.lengths, dtype=np.int64) * self._dtype.itemsize
        if (self.lengths <= 0).any() or (self._offsets != ends - self.lengths * np.int64(self._dtype.itemsize)).any():
            raise self._damaged("idx", "its lengths and offsets contradict each other")
        starts = self.documents
        if starts[0] != 0 or (starts[1:] < starts[:-1]).any() or starts[-1] != len(self.lengths):
            raise self._damaged("idx", "its documents are not in order")
        size = int(ends[-1]) if len(ends) else 0
        if len(self._data) != size:
            raise self._damaged("bin", f"it has {len(self._data):,} bytes, not the {size:,} of its index")

    def range_of_document(self, document: int) -> range:
        """Numbers of the sequences of a document. Raises DamagedFile if there are no such sequences."""
        start, end = self.documents.item(document), self.documents.item(document + 1)
        if not 0 <= start <= end <= len(self.lengths):
            raise self._damaged("idx", "its documents are not in order")
        return range(start, end)

    def range(self, sequence: int) -> Range:
        """The bytes of a sequence in the file. Raises DamagedFile if they are outside of it."""
        offset = self._offsets.item(sequence)
        size = self.lengths.item(sequence) * self._dtype.itemsize
        if not 0 <= offset <= offset + size <= len(self._data):
            raise self._damaged("bin", "its size does not fit its index")
        return Range(self._data, offset, size)

    def __getitem__(self, sequence: int) -> np.ndarray:
        content, offset, size = self.range(sequence)
        return content[offset : offset + size].view(self._dtype)

    def _damaged(self, suffix: str, what: str) -> DamagedFile:
        return damaged_file(f"{self._name}.{suffix}", what, "preprocess again")


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")
