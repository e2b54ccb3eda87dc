"""Writes the shards of a preprocessed data set. The files are described in ``docs/shard_format.md``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.chat import TokenizedSample
from neo_megatron.data.shards.arrays import write_array
from neo_megatron.data.shards.entries import shard_name
from neo_megatron.data.shards.indexed import SequenceWriter
from neo_megatron.data.shards.reader import MEDIA, SAMPLE


class ShardWriter:
    """Writes one shard; its files appear when ``commit`` is called."""

    def __init__(self, directory: Path, number: int) -> None:
        self._prefix = directory / shard_name(number)
        self._tokens = SequenceWriter(self._path("tokens"), np.int32)
        self._spans = SequenceWriter(self._path("spans"), np.int32)
        self._images = SequenceWriter(self._path("pictures"), np.uint8)
        self._grids: list[tuple[int, int]] = []
        self._samples: list[tuple[int, int, int, int, int]] = []
        self._media: list[tuple[int, int, int]] = []

    def add(
        self,
        sample: TokenizedSample,
        images: list[np.ndarray],
        grids: list[tuple[int, int]],
        source: int,
        record: int,
        key: int,
        media: Sequence[tuple[int, int]],
    ) -> None:
        """Appends a sample.

        Args:
            sample: its tokens and trained ranges.
            images: uint8 [n] each, encoded bytes or flattened patches.
            grids: of the images, in patches.
            source: index of its annotation file.
            record: number of its record in that file.
            key: identity of its text, which decides its side of a held-out split if its record has no media.
            media: identities, by path and by content, of its image and video files.
        """
        self._tokens.add(sample.tokens)
        self._spans.add(sample.spans.reshape(-1))
        for image in images:
            self._images.add(image)
        self._images.end_document()
        self._grids += grids
        trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
        self._media += [(len(self._samples), path, content) for path, content in media]
        self._samples.append((source, record, trained, len(images), key))

    def end_record(self) -> None:
        """Ends the record of the samples since the last call, which is one document of the token file."""
        self._tokens.end_document()
        self._spans.end_document()

    def discard(self) -> None:
        """Removes the unfinished files."""
        for writer in (self._tokens, self._spans, self._images):
            writer.discard()

    def commit(self) -> dict[str, Any]:
        """Makes the files of the shard appear under their names; returns its entry in the manifest."""
        files = self._tokens.commit() | self._spans.commit() | self._images.commit()
        grids = np.array(self._grids, np.int32).reshape(-1, 2)
        media = np.array(self._media, MEDIA)
        for kind, array in (("grids", grids), ("samples", np.array(self._samples, SAMPLE)), ("media", media)):
            path = self._path(kind + ".npy")
            files[path.name] = write_array(path, array)
        counts = {"samples": len(self._samples), "pictures": len(grids), "media": len(media)}
        return {"name": self._prefix.name, **counts, "files": files}

    def _path(self, kind: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.{kind}")
