"""Reads the shards of a preprocessed data set: tokenized samples and their images, for packs of any length.

The files are described in ``docs/shard_format.md``.
"""

import hashlib
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
from neo_megatron.data.config import ChatLayout, ImageStore, PreprocessConfig
from neo_megatron.data.image import PATCH_VALUES, image_tokens
from neo_megatron.data.manifest import manifest_bytes, parse_manifest
from neo_megatron.data.shards.arrays import array_of
from neo_megatron.data.shards.entries import ShardEntries, ShardEntry
from neo_megatron.data.shards.indexed import SequenceReader
from neo_megatron.data.shards.references import BrokenReference, Reference, read_references
from neo_megatron.errors import DamagedFile, damaged_file
from neo_megatron.paths import Wanted
from neo_megatron.storage.base import Content, Directory, Range
from neo_megatron.storage.open import open_directory

FORMAT, VERSION = "neo-shards", 3
READABLE = (2, VERSION)  # version 2 has no ``media.npy``
SAMPLE = np.dtype([("source", "<i4"), ("record", "<i8"), ("trained", "<i4"), ("pictures", "<i4"), ("key", "<u8")])
MEDIA = np.dtype([("sample", "<i4"), ("path", "<u8"), ("content", "<u8")])
# Needed for any sample; shards of version 2 have no media.npy.
_MAPPED_FILES = ("tokens.idx", "spans.idx", "spans.bin", "pictures.idx", "grids.npy", "samples.npy", "media.npy")
_FILES_OF_A_SHARD = 9
# A process may have 65,530 maps (Linux, vm.max_map_count), and each holds a file descriptor.
_MOST_MAPS = 32768
_SPAN_BYTES = 8
_MAX_GRID = 1 << 16  # patches along a side: a million pixels
_AGAIN = "preprocess again"
_DOCUMENT_SCHEMAS = ("text", "interleaved")
# Of samples. A sample with a video of several frames counts as video, whatever else it has.
SAMPLE_MODALITIES = ("text", "image", "several images", "video")


@dataclass(frozen=True)
class StoredSample:
    """One sample as its shard keeps it.

    Args:
        tokens: int32 [n].
        spans: int32 [k, 2], half-open ranges of trained tokens.
        grids: int32 [p, 2], in patches, one for each ``<img>`` in ``tokens``.
        images: uint8 [bytes] each, in the form of ``ShardSet.image_store``, with the bytes of the file in place of a
            reference; empty if they were not asked for.
    """

    tokens: np.ndarray
    spans: np.ndarray
    grids: np.ndarray
    images: list[np.ndarray]


class Shard:
    """One shard with mapped files, whose sizes are compared with the manifest, so an incomplete copy is detected.

    Raises:
        DataError: from any method or property: a file is missing or damaged.
    """

    def __init__(self, directory: Directory, entry: ShardEntry) -> None:
        self._directory = directory
        self.name, self._sizes = entry.name, entry.sizes
        self._samples, self._images, self._media = entry.samples, entry.images, entry.media
        self.tokens = self._sequences("tokens", np.int32, directory.open, self._samples)
        self.spans = self._sequences("spans", np.int32, directory.map, self._samples)
        self.images = self._sequences("pictures", np.uint8, directory.open, self._images, self._samples)

    @cached_property
    def samples(self) -> np.ndarray:
        """Rows of samples: ``SAMPLE`` [samples]."""
        rows = self._rows("samples.npy", SAMPLE, (self._samples,))
        if (rows["pictures"] < 0).any() or rows["pictures"].sum(dtype=np.int64) != self._images:
            raise self._damaged("samples.npy", f"its samples do not have the {self._images} images of the shard")
        return rows

    @cached_property
    def grids(self) -> np.ndarray:
        """Grids of images in patches, int32 [images, 2]; values are checked where they are used, see `check_grids`."""
        return self._rows("grids.npy", np.dtype("<i4"), (self._images, 2))

    @cached_property
    def media(self) -> np.ndarray:
        """Identities of the image and video files of samples: ``MEDIA`` [files], by ``sample`` ascending."""
        rows = self._rows("media.npy", MEDIA, (self._media,))
        owners = rows["sample"]
        if len(rows) and (owners[0] < 0 or owners[-1] >= self._samples or (owners[1:] < owners[:-1]).any()):
            raise self._damaged("media.npy", "its samples are not in order, or not those of the shard")
        return rows

    @cached_property
    def modalities(self) -> np.ndarray:
        """The index in `SAMPLE_MODALITIES` of each sample, int8 [samples].

        Shards of version 2 do not tell frames of a video from images.
        """
        images = self.samples["pictures"]
        modalities = np.minimum(images, 2).astype(np.int8)
        if f"{self.name}.media.npy" in self._sizes:
            files = np.bincount(self.media["sample"], minlength=self._samples)
            modalities[images > files] = SAMPLE_MODALITIES.index("video")
        return modalities

    @property
    def image_tokens(self) -> np.ndarray:
        """Image tokens of each sample, int64 [samples]."""
        ends = np.cumsum(self.samples["pictures"], dtype=np.int64)
        if wrong := check_grids(self.grids):
            raise self._damaged("grids.npy", wrong)
        up_to = np.concatenate([[0], np.cumsum(image_tokens(self.grids))])
        return np.diff(up_to[ends], prepend=0)

    def check_text(self) -> None:
        """Checks all of the token index, which opening a shard does not read. Raises DamagedFile."""
        self.tokens.check()

    def image_range(self, sample: int) -> range:
        """Numbers of the images of a sample, within the shard."""
        return self.images.range_of_document(sample)

    def _sequences(
        self,
        kind: str,
        dtype: type,
        open_data: Callable[[str, int], Content],
        count: int,
        documents: int | None = None,
    ) -> SequenceReader:
        index, data = f"{self.name}.{kind}.idx", f"{self.name}.{kind}.bin"
        return SequenceReader(
            f"{self._directory.location}/{self.name}.{kind}",
            self._directory.map(index, self._sizes[index]),
            open_data(data, self._sizes[data]),
            dtype,
            count,
            documents,
        )

    def _rows(self, kind: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A mapped array of the shape given by the manifest."""
        name = f"{self.name}.{kind}"
        content = self._directory.map(name, self._sizes[name])
        return array_of(content, dtype, shape, f"{self._directory.location}/{name}", _AGAIN)

    def _damaged(self, kind: str, what: str) -> DamagedFile:
        return damaged_file(f"{self._directory.location}/{self.name}.{kind}", what, _AGAIN)


def check_grids(grids: np.ndarray) -> str:
    """Says what is wrong with grids of images in patches, int32 [n, 2]; "" for nothing."""
    if len(grids) and (grids.min() < 2 or grids.max() > _MAX_GRID or (grids & 1).any()):
        return f"a grid is not even and positive, at most {_MAX_GRID} patches a side"
    return ""


class ShardSet:
    """All shards of a directory as one list of samples. Shards are mapped on first use, in each process separately.

    Args:
        location: a local directory, or an address that `open_directory` accepts.

    Attributes:
        fingerprint: SHA-256 of the manifest, which contains the checksums of all files and the preprocessed paths.
        text_fingerprint: SHA-256 of the tokens alone, which does not depend on where annotations and images were.
        manifest: without ``shards``.
        entries: those of the shards.
        version: of the format.
        vocabulary: number of tokens of the tokenizer.
        chat_layout: of its conversations; None if all sources are documents, which are alike in every layout.

    Raises:
        DataError: the location does not hold a complete data set of a readable version.
    """

    def __init__(self, location: str | Path) -> None:
        self.storage = open_directory(location)
        self.location = self.storage.location
        text = manifest_bytes(self.storage, Wanted.SHARDS)
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self.manifest = parse_manifest(text, self.location, FORMAT, *READABLE)
        self.version: int = self.manifest["version"]
        self.vocabulary: int = self.manifest["tokenizer"]["size"]
        self.ids = SpecialIds(**self.manifest["tokenizer"]["ids"])
        self.image_store: ImageStore = self.manifest["settings"]["image_store"]
        self.chat_layout = _chat_layout(self.manifest)
        shards = self.manifest.pop("shards")
        self.entries = ShardEntries(shards, self.version)
        tokens = [entry["files"][f"{entry['name']}.tokens.bin"]["sha256"] for entry in shards]
        self.text_fingerprint = hashlib.sha256("".join(tokens).encode()).hexdigest()
        self._starts = [0, *np.cumsum(self.entries.samples).tolist()]
        self._opened: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}  # a mapped array would be copied to the other process

    def locate(self, sample: int) -> tuple[Shard, int]:
        """The shard of a sample, given by its number in the data set, and its number in that shard."""
        number = bisect_right(self._starts, sample) - 1
        return self.shard(number), sample - self._starts[number]

    def shard(self, number: int) -> Shard:
        """An opened shard. The least recently used ones are closed; arrays that were read from them stay valid."""
        shard = self._opened.get(number)
        if shard is None:
            self._prepare([number])
            shard = self._opened[number] = Shard(self.storage, self.entries[number])
            if len(self._opened) > _most_opened():
                self._opened.popitem(last=False)
        else:
            self._opened.move_to_end(number)
        return shard

    def fetch(self, samples: Sequence[int], images: bool = True) -> list[StoredSample]:
        """The samples of the given numbers, in their order; requests to object storage are concurrent.

        Raises:
            DataError: a file is damaged, or one that is referred to has changed.
        """
        self._prepare({bisect_right(self._starts, sample) - 1 for sample in samples})
        located = [self.locate(sample) for sample in samples]
        numbers = [shard.image_range(local) for shard, local in located]
        ranges: list[Range] = []
        for (shard, local), wanted in zip(located, numbers, strict=True):
            ranges += [shard.tokens.range(local), shard.spans.range(local)]
            if ranges[-1].size % _SPAN_BYTES:
                path = f"{self.location}/{shard.name}.spans.idx"
                raise damaged_file(path, f"a trained range of sample {local} has no end", _AGAIN)
            ranges += [shard.images.range(number) for number in wanted] if images else []
        arrays = iter(self.storage.read_ranges(ranges))
        found = [
            StoredSample(
                tokens=next(arrays).view(np.int32),
                spans=next(arrays).view(np.int32).reshape(-1, 2),
                grids=shard.grids[wanted.start : wanted.stop],
                images=list(islice(arrays, len(wanted))) if images else [],
            )
            for (shard, _), wanted in zip(located, numbers, strict=True)
        ]
        if images and self.image_store == "reference":
            self._follow(found, [shard for shard, _ in located])
        return found

    def _follow(self, samples: Sequence[StoredSample], shards: Sequence[Shard]) -> None:
        """Puts the bytes of images in the place of the references to them, those of all samples at once."""
        references: list[Reference] = []
        for sample, shard in zip(samples, shards, strict=True):
            try:
                references += map(Reference.unpack, sample.images)
            except BrokenReference as error:
                raise damaged_file(f"{self.location}/{shard.name}.pictures.bin", str(error), _AGAIN) from error
        read = iter(read_references(references))
        for sample in samples:
            sample.images[:] = islice(read, len(sample.images))

    def _prepare(self, numbers: Iterable[int]) -> None:
        """Fetches the files of shards that are about to be opened, all at the same time."""
        entries = (self.entries[number] for number in numbers if number not in self._opened)
        files = ((f"{entry.name}.{kind}", entry.sizes) for entry in entries for kind in _MAPPED_FILES)
        self.storage.prepare((name, sizes[name]) for name, sizes in files if name in sizes)

    def describe(self, sample: int) -> tuple[str, int]:
        """(annotation file, record number) that a sample came from."""
        source, record = self.source(sample)
        return source["annotations"], record

    def source(self, sample: int) -> tuple[dict[str, Any], int]:
        """(entry of the manifest, record number) that a sample came from."""
        shard, local = self.locate(sample)
        source, record = int(shard.samples["source"][local]), int(shard.samples["record"][local])
        sources = self.manifest["sources"]
        if not 0 <= source < len(sources):
            path = f"{self.location}/{shard.name}.samples.npy"
            raise damaged_file(path, f"sample {local} comes from a source that is not in the manifest", _AGAIN)
        return sources[source], record

    def data_set(self, sample: int) -> tuple[str, int]:
        """(name of the data set, index in `SAMPLE_MODALITIES`) of a sample."""
        shard, local = self.locate(sample)
        return self.source(sample)[0]["name"], int(shard.modalities[local])

    @property
    def data_sets(self) -> set[str]:
        """Names of the data sets."""
        return {source["name"] for source in self.manifest["sources"]}


def _chat_layout(manifest: dict[str, Any]) -> ChatLayout | None:
    chats = [source for source in manifest["sources"] if not _is_of_documents(source)]
    return manifest["settings"].get("chat_layout", PreprocessConfig.chat_layout) if chats else None


def _is_of_documents(source: dict[str, Any]) -> bool:
    """Whether all samples of a source, an entry of a manifest, are documents."""
    schema = source.get("schema")
    return schema in _DOCUMENT_SCHEMAS or (schema == "caption" and "caption_prompts_sha256" not in source)


@cache
def _most_opened() -> int:
    """Maximum number of open shards, which use at most half of the file descriptors that the process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * _MOST_MAPS if hard == resource.RLIM_INFINITY else min(2 * _MOST_MAPS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        # The usual 1024 would allow only 64 open shards; it exists to protect programs that call select().
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most // 2 // _FILES_OF_A_SHARD)


def patches_of(stored: np.ndarray) -> np.ndarray:
    """Flattened patches as stored -> uint8 [image tokens, 4, 768]."""
    return stored.reshape(-1, 4, PATCH_VALUES)
