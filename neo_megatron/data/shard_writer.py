"""Writes the shards of a preprocessed data set. The files are described in ``docs/shard_format.md``."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.chat import TokenizedSample
from neo_megatron.data.files import write_whole
from neo_megatron.data.indexed import SequenceWriter
from neo_megatron.data.shards import SAMPLE, shard_name


class ShardWriter:
    """Writes one shard; its files appear when ``commit`` is called."""

    def __init__(self, directory: Path, number: int) -> None:
        self._prefix = directory / shard_name(number)
        self._tokens = SequenceWriter(self._path("tokens"), np.int32)
        self._spans = SequenceWriter(self._path("spans"), np.int32)
        self._pictures = SequenceWriter(self._path("pictures"), np.uint8)
        self._grids: list[tuple[int, int]] = []
        self._samples: list[tuple[int, int, int, int, int]] = []

    def add(
        self,
        sample: TokenizedSample,
        pictures: list[np.ndarray],
        grids: list[tuple[int, int]],
        source: int,
        record: int,
        key: int,
    ) -> None:
        """Appends a sample.

        Args:
            pictures: uint8 [n] each, encoded bytes or flattened patches.
            grids: of the pictures, in patches.
            source, record: where it comes from.
            key: 64 bits that decide on which side of a held-out split it falls, wherever it is packed.
        """
        self._tokens.add(sample.tokens)
        self._spans.add(sample.spans.reshape(-1))
        for picture in pictures:
            self._pictures.add(picture)
        self._pictures.end_document()
        self._grids += grids
        trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
        self._samples.append((source, record, trained, len(pictures), key))

    def end_record(self) -> None:
        """The samples since the last call are one record: one document of the token file."""
        self._tokens.end_document()
        self._spans.end_document()

    def discard(self) -> None:
        """Leaves nothing behind."""
        for writer in (self._tokens, self._spans, self._pictures):
            writer.discard()

    def commit(self) -> dict[str, Any]:
        """Makes the shard appear; returns its entry in the manifest."""
        files = self._tokens.commit() | self._spans.commit() | self._pictures.commit()
        grids = np.array(self._grids, np.int32).reshape(-1, 2)
        for kind, array in (("grids", grids), ("samples", np.array(self._samples, SAMPLE))):
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            path = self._path(kind + ".npy")
            files[path.name] = write_whole(path, buffer.getvalue())
        return {"name": self._prefix.name, "samples": len(self._samples), "pictures": len(grids), "files": files}

    def _path(self, kind: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.{kind}")
