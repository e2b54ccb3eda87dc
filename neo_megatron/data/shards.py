"""The shards of a preprocessed data set: tokenized samples and their pictures, written once, read for any pack length.

The files are described in ``docs/shard_format.md``.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.errors import DataError
from neo_megatron.data.files import read_manifest
from neo_megatron.data.image import PATCH_VALUES
from neo_megatron.data.indexed import SequenceReader
from neo_megatron.data.settings import ImageStore

FORMAT, VERSION = "neo-shards", 2
SAMPLE = np.dtype([("source", "<i4"), ("record", "<i8"), ("trained", "<i4"), ("pictures", "<i4"), ("key", "<u8")])


@dataclass(frozen=True)
class StoredSample:
    """One sample as its shard keeps it.

    Args:
        tokens: int32 [n].
        spans: int32 [k, 2], half-open ranges of trained tokens.
        grids: int32 [p, 2], in patches, one for each ``<img>`` in ``tokens``.
        pictures: uint8 [bytes] each, as ``ShardSet.image_store`` says; empty where they were not asked for.
    """

    tokens: np.ndarray
    spans: np.ndarray
    grids: np.ndarray
    pictures: list[np.ndarray]


def shard_name(number: int) -> str:
    return f"{number:05d}"


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

    def fetch(self, samples: Sequence[int], pictures: bool = True) -> list[StoredSample]:
        """The samples of the given numbers, in their order."""
        return [self._stored(*self.locate(sample), pictures) for sample in samples]

    def _stored(self, shard: Shard, local: int, pictures: bool) -> StoredSample:
        numbers = shard.picture_range(local)
        return StoredSample(
            tokens=shard.tokens[local],
            spans=shard.spans[local].reshape(-1, 2),
            grids=shard.grids[numbers.start : numbers.stop],
            pictures=[shard.picture(number) for number in numbers] if pictures else [],
        )

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
