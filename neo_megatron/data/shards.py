"""The shards of a preprocessed data set: tokenized samples and their pictures, written once, read for any pack length.

The files are described in ``docs/shard_format.md``.
"""

import hashlib
import math
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.errors import DataError
from neo_megatron.data.files import manifest_bytes, parse_manifest
from neo_megatron.data.image import PATCH_VALUES
from neo_megatron.data.indexed import SequenceReader
from neo_megatron.data.settings import ImageStore
from neo_megatron.data.storage import Content, Directory, Range, open_directory
from neo_megatron.paths import Wanted

FORMAT, VERSION = "neo-shards", 3
READABLE = (2, VERSION)  # version 2 has no ``media.npy``
SAMPLE = np.dtype([("source", "<i4"), ("record", "<i8"), ("trained", "<i4"), ("pictures", "<i4"), ("key", "<u8")])
MEDIA = np.dtype([("sample", "<i4"), ("path", "<u8"), ("content", "<u8")])
_MAPPED_FILES = ("tokens.idx", "spans.idx", "spans.bin", "pictures.idx", "grids.npy")  # needed for any sample
_FILES_OF_A_SHARD = 9
# A process may have 65,530 maps (Linux, vm.max_map_count), and each holds a file descriptor.
_MOST_MAPS = 32768
_NPY_PREFIX = 10  # bytes of an .npy file before its header text


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
    """One shard; its files are mapped. Sizes are held against the manifest, so a cut copy is found when it is read."""

    def __init__(self, directory: Directory, entry: dict[str, Any]) -> None:
        self._directory = directory
        self._name = shard_name(int(entry["name"]))
        self._files, self._samples, self._pictures = entry["files"], entry["samples"], entry["pictures"]
        self._media = entry.get("media", 0)
        self.tokens = self._sequences("tokens", np.int32, directory.open)
        self.spans = self._sequences("spans", np.int32, directory.map)
        self.pictures = self._sequences("pictures", np.uint8, directory.open)

    @cached_property
    def samples(self) -> np.ndarray:
        """``SAMPLE`` [samples]"""
        return self._rows("samples.npy", SAMPLE, (self._samples,))

    @cached_property
    def grids(self) -> np.ndarray:
        """int32 [pictures, 2]"""
        return self._rows("grids.npy", np.dtype("<i4"), (self._pictures, 2))

    @cached_property
    def media(self) -> np.ndarray:
        """``MEDIA`` [files], by ``sample`` ascending: identities of the image and video files of the samples."""
        return self._rows("media.npy", MEDIA, (self._media,))

    @property
    def cells(self) -> np.ndarray:
        """int64 [samples]: cells of the pictures of each sample, which are tokens of it."""
        ends = np.cumsum(self.samples["pictures"], dtype=np.int64)
        up_to = np.concatenate([[0], np.cumsum(self.grids.prod(axis=1, dtype=np.int64) // 4)])
        return np.diff(up_to[ends], prepend=0)

    def picture_range(self, sample: int) -> range:
        """Numbers of the pictures of a sample, within the shard."""
        return range(self.pictures.documents.item(sample), self.pictures.documents.item(sample + 1))

    def picture(self, number: int) -> np.ndarray:
        """uint8 [n]: the file's bytes or the flattened patches, as ``ShardSet.image_store`` says."""
        return self.pictures[number]

    def _sequences(self, kind: str, dtype: type, open_data: Callable[[str, int], Content]) -> SequenceReader:
        index, data = f"{self._name}.{kind}.idx", f"{self._name}.{kind}.bin"
        return SequenceReader(
            f"{self._directory.location}/{self._name}.{kind}",
            self._directory.map(index, self._files[index]["bytes"]),
            open_data(data, self._files[data]["bytes"]),
            dtype,
        )

    def _rows(self, kind: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A mapped array of the shape that the manifest says; ``numpy.load`` would take longer than the whole shard."""
        name, size = f"{self._name}.{kind}", dtype.itemsize * math.prod(shape)
        content = self._directory.map(name, self._files[name]["bytes"])
        start = len(content) - size
        described = f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': {shape}, }}"
        if content[: max(start, 0)].tobytes()[_NPY_PREFIX:].rstrip().decode("latin1") != described:
            raise DataError(
                f"{self._directory.location}/{name} is damaged: it is no array of {shape}; preprocess again"
            )
        return content[start:].view(dtype).reshape(shape)


class ShardSet:
    """All shards of a directory as one list of samples. Shards are mapped on first use, in each process anew.

    Args:
        location: a local directory, or what else ``storage.open_directory`` takes.

    Attributes:
        fingerprint: SHA-256 of the manifest, which has those of all files.
        version: of the format.
    """

    def __init__(self, location: str | Path) -> None:
        self.storage = open_directory(location)
        self.location = self.storage.location
        text = manifest_bytes(self.storage, Wanted.SHARDS)
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self.manifest = parse_manifest(text, self.location, FORMAT, *READABLE)
        self.version: int = self.manifest["version"]
        self.ids = SpecialIds(**self.manifest["tokenizer"]["ids"])
        self.image_store: ImageStore = self.manifest["settings"]["image_store"]
        self._entries = self.manifest["shards"]
        self._starts = np.cumsum([0] + [entry["samples"] for entry in self._entries]).tolist()
        self._opened: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}  # a mapped array would be copied to the other process

    def locate(self, sample: int) -> tuple[Shard, int]:
        """The shard of a global sample number, and the sample's number in it."""
        number = bisect_right(self._starts, sample) - 1
        return self.shard(number), sample - self._starts[number]

    def shard(self, number: int) -> Shard:
        """A shard, opened. The least recently used ones are closed; what was read of them stays valid."""
        shard = self._opened.get(number)
        if shard is None:
            self._prepare([number])
            shard = self._opened[number] = Shard(self.storage, self._entries[number])
            if len(self._opened) > _most_opened():
                self._opened.popitem(last=False)
        else:
            self._opened.move_to_end(number)
        return shard

    def fetch(self, samples: Sequence[int], pictures: bool = True) -> list[StoredSample]:
        """The samples of the given numbers, in their order; from object storage all are requested at the same time."""
        self._prepare({bisect_right(self._starts, sample) - 1 for sample in samples})
        located = [self.locate(sample) for sample in samples]
        numbers = [shard.picture_range(local) for shard, local in located]
        ranges: list[Range] = []
        for (shard, local), wanted in zip(located, numbers, strict=True):
            ranges += [shard.tokens.range(local), shard.spans.range(local)]
            ranges += [shard.pictures.range(number) for number in wanted] if pictures else []
        arrays = iter(self.storage.read_ranges(ranges))
        return [
            StoredSample(
                tokens=next(arrays).view(np.int32),
                spans=next(arrays).view(np.int32).reshape(-1, 2),
                grids=shard.grids[wanted.start : wanted.stop],
                pictures=list(islice(arrays, len(wanted))) if pictures else [],
            )
            for (shard, _), wanted in zip(located, numbers, strict=True)
        ]

    def _prepare(self, numbers: Iterable[int]) -> None:
        """Has the files of shards that are about to be opened fetched at the same time."""
        entries = (self._entries[number] for number in numbers if number not in self._opened)
        files = ((f"{shard_name(int(entry['name']))}.{kind}", entry) for entry in entries for kind in _MAPPED_FILES)
        self.storage.prepare((name, entry["files"][name]["bytes"]) for name, entry in files)

    def describe(self, sample: int) -> tuple[str, int]:
        """(annotation file, record number) that a sample came from."""
        shard, local = self.locate(sample)
        row = shard.samples[local]
        return self.manifest["sources"][row["source"]]["annotations"], int(row["record"])


@cache
def _most_opened() -> int:
    """Shards that are open at once, at most; half of the descriptors that the process may have is left to others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * _MOST_MAPS if hard == resource.RLIM_INFINITY else min(2 * _MOST_MAPS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        # The usual 1024 would leave 64 shards open; that limit protects programs that call select().
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most // 2 // _FILES_OF_A_SHARD)


def patches_of(stored: np.ndarray) -> np.ndarray:
    """Flattened patches as stored -> uint8 [cells, 4, 768]."""
    return stored.reshape(-1, 4, PATCH_VALUES)
