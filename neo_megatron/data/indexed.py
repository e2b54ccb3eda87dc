"""Megatron's ``.bin`` / ``.idx`` pair: sequences of numbers behind one another, and where each begins.

Written and read with NumPy alone, so that workers need no torch; ``megatron.core.datasets.indexed_dataset`` opens the
same files. ``docs/shard_format.md`` has the layout.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.errors import DataError
from neo_megatron.data.files import WholeFile, write_whole

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}


class SequenceWriter:
    """Writes ``{prefix}.bin`` as sequences come and ``{prefix}.idx`` at the end."""

    def __init__(self, prefix: Path, dtype: type) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._bin = WholeFile(_file(prefix, "bin"))
        self._lengths: list[int] = []
        self._documents = [0]

    def add(self, sequence: np.ndarray) -> None:
        """Appends one sequence, [n] of the writer's type."""
        if sequence.dtype != self._dtype:
            raise TypeError(f"{self._prefix} holds {self._dtype}, not {sequence.dtype}")
        self._bin.write(np.ascontiguousarray(sequence))
        self._lengths.append(sequence.size)

    def end_document(self) -> None:
        self._documents.append(len(self._lengths))

    def commit(self) -> dict[str, dict[str, Any]]:
        """Makes both files appear; returns what a manifest says of them."""
        lengths = np.array(self._lengths, np.int64)
        offsets = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        header = _HEADER.pack(_MAGIC, 1, _CODES[self._dtype], len(lengths), len(self._documents))
        documents = np.array(self._documents, np.int64)
        index = header + lengths.astype(np.int32).tobytes() + offsets.tobytes() + documents.tobytes()
        files = [_file(self._prefix, "bin"), _file(self._prefix, "idx")]
        return {files[0].name: self._bin.commit(), files[1].name: write_whole(files[1], index)}

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._bin.discard()


class SequenceReader:
    """Maps a pair of files; nothing is read before it is asked for.

    Attributes:
        lengths: int32 [sequences].
        documents: int64 [documents + 1], first sequence of each document, and the number of sequences.
    """

    def __init__(self, prefix: Path, dtype: type) -> None:
        index_path = _file(prefix, "idx")
        index = np.memmap(index_path, np.uint8, "r")
        if len(index) < _HEADER.size:
            raise DataError(f"{index_path} is damaged: it is shorter than its header; preprocess again")
        magic, version, code, sequences, documents = _HEADER.unpack(index[: _HEADER.size].tobytes())
        size = _HEADER.size + 12 * sequences + 8 * documents
        if (magic, version, code, size) != (_MAGIC, 1, _CODES[np.dtype(dtype)], len(index)):
            raise DataError(f"{index_path} is damaged: its header does not fit the file; preprocess again")
        self.lengths = np.frombuffer(index, np.int32, sequences, _HEADER.size)
        self._offsets = np.frombuffer(index, np.int64, sequences, _HEADER.size + 4 * sequences)
        self.documents = np.frombuffer(index, np.int64, documents, _HEADER.size + 12 * sequences)
        data_path = _file(prefix, "bin")
        # An empty file cannot be mapped; a shard without a picture has one.
        self._data = np.memmap(data_path, dtype, "r") if data_path.stat().st_size else np.empty(0, dtype)
        end = self._offsets[-1] // self._data.itemsize + self.lengths[-1] if sequences else 0
        if end != len(self._data):
            raise DataError(f"{data_path} is damaged: its size does not fit its index; preprocess again")

    def __getitem__(self, sequence: int) -> np.ndarray:
        start = self._offsets[sequence] // self._data.itemsize
        return self._data[start : start + self.lengths[sequence]]


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")
