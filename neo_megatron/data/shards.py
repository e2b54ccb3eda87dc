"""The shards of a preprocessed data set: tokenized samples and their pictures, written once, read for any pack length.

The files are described in ``docs/shard_format.md``.
"""

import io
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neo_megatron.data.chat import SpecialIds, TokenizedSample
from neo_megatron.data.errors import DataError
from neo_megatron.data.files import read_manifest, write_whole
from neo_megatron.data.image import PATCH_VALUES
from neo_megatron.data.indexed import SequenceReader, SequenceWriter

FORMAT, VERSION = "neo-shards", 1
ImageStore = Literal["encoded", "patches"]
SAMPLE = np.dtype([("source", "<i4"), ("record", "<i8"), ("trained", "<i4"), ("pictures", "<i4")])


def shard_name(number: int) -> str:
    return f"{number:05d}"


class ShardWriter:
    """Writes one shard; its files appear when ``commit`` is called."""

    def __init__(self, directory: Path, number: int) -> None:
        self._prefix = directory / shard_name(number)
        self._tokens = SequenceWriter(self._path("tokens"), np.int32)
        self._spans = SequenceWriter(self._path("spans"), np.int32)
        self._pictures = SequenceWriter(self._path("pictures"), np.uint8)
        self._grids: list[tuple[int, int]] = []
        self._samples: list[tuple[int, int, int, int]] = []

    def add(
        self,
        sample: TokenizedSample,
        pictures: list[np.ndarray],
        grids: list[tuple[int, int]],
        source: int,
        record: int,
    ) -> None:
        """Appends a sample. ``pictures``: uint8 [n] each, encoded bytes or flattened patches; ``grids`` in patches."""
        self._tokens.add(sample.tokens)
        self._spans.add(sample.spans.reshape(-1))
        for picture in pictures:
            self._pictures.add(picture)
        self._pictures.end_document()
        self._grids += grids
        trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
        self._samples.append((source, record, trained, len(pictures)))

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


class Shard:
    """One shard, mapped. Sizes of files are held against the manifest, so a cut copy is found when it is opened."""

    def __init__(self, directory: Path, entry: dict[str, Any]) -> None:
        for name, file in entry["files"].items():
            path = directory / Path(name).name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise DataError(f"{path} is missing or not {file['bytes']} bytes long; copy or preprocess it again")
        self._prefix = directory / shard_name(int(entry["name"]))
        self.tokens = SequenceReader(self._path("tokens"), np.int32)
        self.spans = SequenceReader(self._path("spans"), np.int32)

    @cached_property
    def samples(self) -> np.ndarray:
        """``SAMPLE`` [samples]"""
        return np.load(self._path("samples.npy"), allow_pickle=False)

    @cached_property
    def grids(self) -> np.ndarray:
        """int32 [pictures, 2]"""
        return np.load(self._path("grids.npy"), allow_pickle=False)

    @cached_property
    def _pictures(self) -> SequenceReader:
        return SequenceReader(self._path("pictures"), np.uint8)

    def picture_range(self, sample: int) -> range:
        """Numbers of the pictures of a sample, within the shard."""
        return range(*self._pictures.documents[sample : sample + 2].tolist())

    def picture(self, number: int) -> np.ndarray:
        """uint8 [n]: the file's bytes or the flattened patches, as ``ShardSet.image_store`` says."""
        return self._pictures[number]

    def _path(self, kind: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.{kind}")


class ShardSet:
    """All shards of a directory as one list of samples. Shards are mapped on first use, in each process anew."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory, FORMAT, VERSION)
        self.ids = SpecialIds(**self.manifest["tokenizer"]["ids"])
        self.image_store: ImageStore = self.manifest["settings"]["image_store"]
        self._entries = self.manifest["shards"]
        self._starts = np.cumsum([0] + [entry["samples"] for entry in self._entries]).tolist()
        self._opened: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # a mapped array would be copied to the other process

    def locate(self, sample: int) -> tuple[Shard, int]:
        """The shard of a global sample number, and the sample's number in it."""
        number = bisect_right(self._starts, sample) - 1
        return self.shard(number), sample - self._starts[number]

    def shard(self, number: int) -> Shard:
        if number not in self._opened:
            self._opened[number] = Shard(self.directory, self._entries[number])
        return self._opened[number]

    def lengths_and_records(self) -> tuple[np.ndarray, np.ndarray]:
        """Per sample its tokens, int32 [n], and a number that the samples of one record share, int64 [n], ascending."""
        lengths, records, first = [np.empty(0, np.int32)], [np.empty(0, np.int64)], 0
        for number in range(len(self._entries)):
            tokens = self.shard(number).tokens
            lengths.append(tokens.lengths)
            sizes = np.diff(tokens.documents)
            records.append(np.repeat(np.arange(first, first + len(sizes)), sizes))
            first += len(sizes)
        return np.concatenate(lengths), np.concatenate(records)

    def describe(self, sample: int) -> tuple[str, int]:
        """(annotation file, record number) that a sample came from."""
        shard, local = self.locate(sample)
        row = shard.samples[local]
        return self.manifest["sources"][row["source"]]["annotations"], int(row["record"])


def patches_of(stored: np.ndarray) -> np.ndarray:
    """Flattened patches as stored -> uint8 [cells, 4, 768]."""
    return stored.reshape(-1, 4, PATCH_VALUES)
