"""Verifies one shard: its files, how they fit each other, and every sample in them; all damage is listed.

If an index or an array differs from the manifest, it is not read any further. The samples of a ``.bin`` that differs
are still checked, because that may tell which of them are damaged.
"""

import hashlib
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.config import ImageStore, PreprocessConfig
from neo_megatron.data.image import PATCH, PATCH_VALUES, decode, image_grid, image_tokens, pixel_limit
from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.shards.arrays import array_of
from neo_megatron.data.shards.indexed import SequenceReader
from neo_megatron.data.shards.reader import MEDIA, SAMPLE, check_grids
from neo_megatron.data.shards.references import BrokenReference, Reference, read_references
from neo_megatron.data.shards.sample_checks import wrong_spans, wrong_tokens
from neo_megatron.errors import DamagedFile, DataError, RejectedSample
from neo_megatron.storage.base import Directory
from neo_megatron.storage.open import open_directory

SEQUENCES = {"tokens": np.dtype("<i4"), "spans": np.dtype("<i4"), "pictures": np.dtype("u1")}
_CHUNK = 4 << 20
# The settings of an image, and the numbers of images of which one has shared the limit of pixels with it.
_Limits = tuple[PreprocessConfig, range]
# Images that are referred to, and are read together.
_TOGETHER, _TOGETHER_BYTES = 64, 64 << 20
_AGAIN = "preprocess again"


@dataclass(frozen=True)
class Damage:
    """One finding of damage.

    Args:
        file: its name in the directory.
        sentence: what is wrong, with the sample if it is known.
        kind: "lost" if the file is missing, incomplete or unreadable; "changed" if its bytes differ from those of the
            manifest; "content" if the file is as it was written, but its content is wrong.
    """

    file: str
    sentence: str
    kind: Literal["changed", "lost", "content"] = "lost"


@dataclass(frozen=True)
class DataSet:
    """The properties that all shards of a data set share.

    Args:
        location: of the data set.
        ids: of the control tokens.
        vocabulary: number of tokens of the tokenizer.
        image_store: of all shards.
        settings: of preprocessing, for each source.
        annotations: annotation file of each source.
    """

    location: str
    ids: SpecialIds
    vocabulary: int
    image_store: ImageStore
    settings: tuple[PreprocessConfig, ...]
    annotations: tuple[str, ...]


def check_file(
    directory: Directory, name: str, entry: dict[str, Any], report: Callable[[int], Any]
) -> Iterator[Damage]:
    """Compares size and SHA-256 of a file with its entry in the manifest; ``report`` is called with the bytes read."""
    try:
        size = directory.size(name)
    except DataError as error:
        yield Damage(name, str(error))
        return
    if size != entry["bytes"]:
        yield Damage(name, "it is missing" if size is None else f"it has {size:,} bytes, not {entry['bytes']:,}")
        return
    digest = hashlib.sha256()
    try:
        # Read, not mapped, because a bad sector of a mapped file would end the process.
        with open(directory.local(name), "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                report(len(chunk))
    except OSError as error:
        yield Damage(name, f"it cannot be read ({error.strerror})", "lost")
        return
    if digest.hexdigest() != entry["sha256"]:
        yield Damage(name, "its bytes are not those that were written (SHA-256 differs)", "changed")


def check_shard(data: DataSet, entry: dict[str, Any], first: int, report: Callable[[int], Any]) -> list[Damage]:
    """All damage of a shard.

    Args:
        data: the data set of the shard.
        entry: of the shard in the manifest.
        first: number of its first sample in the data set.
        report: is called with the number of bytes that were checked; those of encoded images once they are decoded.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # an image that can be decoded is fine despite warnings
        return _ShardCheck(data, entry, first, report).run()


class _ShardCheck:
    """The state of `check_shard`."""

    def __init__(self, data: DataSet, entry: dict[str, Any], first: int, report: Callable[[int], Any]) -> None:
        self._data, self._entry, self._first, self._report = data, entry, first, report
        self._directory = open_directory(data.location)
        self._damage: list[Damage] = []
        self._state: dict[str, str] = {}  # file -> "sound", or the kind of its damage
        self._rows: np.ndarray | None = None  # samples.npy, if it is sound

    def run(self) -> list[Damage]:
        """Runs all checks."""
        for name, file in self._entry["files"].items():
            silent = self._data.image_store == "encoded" and name == self._name("pictures.bin")
            found = list(check_file(self._directory, name, file, (lambda _: None) if silent else self._report))
            self._damage += found
            self._state[name] = found[0].kind if found else "sound"
        self._rows, grids = self._samples(), self._grids()
        if self._name("media.npy") in self._entry["files"]:
            self._check_media()
        tokens, spans, images = (self._sequences(kind) for kind in SEQUENCES)
        if images is not None and grids is not None:
            self._check_images(images, grids)
        if tokens is not None:
            self._check_tokens(tokens, images, grids)
        if tokens is not None and spans is not None:
            self._check_spans(tokens, spans)
        return self._damage

    def _name(self, kind: str) -> str:
        return f"{self._entry['name']}.{kind}"

    def _add(self, kind: str, sentence: str) -> None:
        """Adds damage inside a file; if the file is as it was written, its content was written wrong."""
        name = self._name(kind)
        self._damage.append(Damage(name, sentence, "content" if self._state[name] == "sound" else "changed"))

    def _array(self, kind: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray | None:
        if self._state[self._name(kind)] != "sound":
            return None
        try:
            return array_of(self._directory.map(self._name(kind)), dtype, shape, self._name(kind), _AGAIN)
        except DamagedFile as damaged:
            self._add(kind, damaged.what)
            return None

    def _samples(self) -> np.ndarray | None:
        samples = self._array("samples.npy", SAMPLE, (self._entry["samples"],))
        if samples is None:
            return None
        known = (samples["source"] >= 0) & (samples["source"] < len(self._data.annotations))
        if not known.all():
            self._add("samples.npy", "a sample comes from a source that is not in the manifest")
            return None
        if (samples["record"] < 0).any() or (samples["pictures"] < 0).any() or (samples["trained"] < 0).any():
            self._add("samples.npy", "a record number, or a number of images or trained tokens, is negative")
            return None
        return samples

    def _check_media(self) -> None:
        media = self._array("media.npy", MEDIA, (self._entry["media"],))
        if media is None or not len(media):
            return
        owners = media["sample"]
        if owners.min() < 0 or owners.max() >= self._entry["samples"] or (owners[1:] < owners[:-1]).any():
            self._add("media.npy", "its samples are not in order, or not those of the shard")
        elif self._rows is not None and (self._rows["pictures"][owners] == 0).any():
            self._add("media.npy", "it has files of a sample without images")

    def _grids(self) -> np.ndarray | None:
        grids = self._array("grids.npy", np.dtype("<i4"), (self._entry["pictures"], 2))
        if grids is not None and (wrong := check_grids(grids)):
            self._add("grids.npy", wrong)
            return None
        return grids

    def _sequences(self, kind: str) -> SequenceReader | None:
        """The reader of a pair of files; ``None`` if the index is inconsistent or the data have another size."""
        index_name, data_name = self._name(f"{kind}.idx"), self._name(f"{kind}.bin")
        if self._state[index_name] != "sound" or self._state[data_name] == "lost":
            return None
        of_images = kind == "pictures"
        try:
            reader = SequenceReader(
                self._name(kind),
                self._directory.map(index_name),
                self._directory.map(data_name),
                SEQUENCES[kind],  # type: ignore[arg-type]
                self._entry["pictures" if of_images else "samples"],
                self._entry["samples"] if of_images else None,
            )
            reader.check()
        except DamagedFile as damaged:
            self._add(f"{kind}.{damaged.path.rpartition('.')[2]}", damaged.what)
            return None
        return reader

    def _add_sample(self, kind: str, sample: int, sentence: str) -> None:
        where = f"sample {self._first + sample}"
        if self._rows is not None:
            row = self._rows[sample]
            where += f" ({self._data.annotations[row['source']]}, record {row['record']})"
        self._add(kind, f"{where}: {sentence}")

    def _check_images(self, images: SequenceReader, grids: np.ndarray) -> None:
        if self._rows is not None and (np.diff(images.documents) != self._rows["pictures"]).any():
            self._add("samples.npy", "its numbers of images differ from those of the image index")
        counts = image_tokens(grids)
        limits = self._limits(images.documents)
        files = _Referred(images) if self._data.image_store == "reference" else None
        for sample, (start, end) in enumerate(zip(images.documents[:-1], images.documents[1:], strict=True)):
            for image in range(start, end):
                name = f"{image - start + 1} of {end - start}"
                if self._data.image_store == "encoded":
                    sentence = _check_encoded(images[image], grids[image], name, limits[sample])
                    self._report(int(images.lengths[image]))
                elif files is not None:
                    data = files[image]
                    sentence = f"the image {name}: {data}" if isinstance(data, Exception) else ""
                    sentence = sentence or _check_encoded(data, grids[image], name, limits[sample])
                else:
                    fits = images.lengths[image] == counts[image] * 4 * PATCH_VALUES
                    sentence = "" if fits else f"the patches of the image {name} do not fit its grid"
                if sentence:
                    self._add_sample("pictures.bin", sample, sentence)

    def _limits(self, documents: np.ndarray) -> list[_Limits | None]:
        """The limits that the images of each sample may have; ``None`` where its source is not known."""
        if self._rows is None:
            return [None] * (len(documents) - 1)
        counts = np.diff(documents)
        # A document that was split shares the limit among its images in all of its samples, which are one record.
        rows = self._rows[["source", "record"]]
        first = np.flatnonzero(np.append(True, rows[1:] != rows[:-1])) if len(rows) else np.empty(0, np.int64)
        totals = np.add.reduceat(counts, first) if len(first) else counts
        of_record = np.repeat(totals, np.diff(first, append=len(rows)))
        limits: list[_Limits | None] = []
        for source, count, total in zip(rows["source"].tolist(), counts.tolist(), of_record.tolist(), strict=True):
            settings = self._data.settings[source]
            # Where frames do not share the limit, it is not known how many of the images do.
            limits.append((settings, range(count if settings.frames_share else 1, total + 1)))
        return limits

    def _check_tokens(self, tokens: SequenceReader, images: SequenceReader | None, grids: np.ndarray | None) -> None:
        for sample in range(len(tokens.lengths)):
            owned = None
            if images is not None and grids is not None:
                owned = grids[images.documents[sample] : images.documents[sample + 1]]
            if sentence := wrong_tokens(tokens[sample], owned, self._data.ids, self._data.vocabulary):
                self._add_sample("tokens.bin", sample, sentence)

    def _check_spans(self, tokens: SequenceReader, spans: SequenceReader) -> None:
        if not np.array_equal(tokens.documents, spans.documents):
            self._add("spans.idx", "its records differ from those of the token index")
        for sample, length in enumerate(tokens.lengths.tolist()):
            trained = None if self._rows is None else int(self._rows["trained"][sample])
            if sentence := wrong_spans(spans[sample], length, trained):
                self._add_sample("spans.bin", sample, sentence)


class _Referred:
    """The files of images that a shard refers to, in ascending order: some are read together, for object storage."""

    def __init__(self, references: SequenceReader) -> None:
        self._references = references
        self._read: dict[int, np.ndarray | Exception] = {}

    def __getitem__(self, image: int) -> Any:
        """The bytes of an image, uint8 [n], or why they cannot be read."""
        if image not in self._read:
            self._read = {}
            self._read_from(image)
        return self._read[image]

    def _read_from(self, image: int) -> None:
        found: dict[int, Reference] = {}
        size = 0
        for number in range(image, min(image + _TOGETHER, len(self._references.lengths))):
            try:
                reference = Reference.unpack(self._references[number])
            except BrokenReference as error:
                self._read[number] = error
                continue
            size += reference.length
            if found and size > _TOGETHER_BYTES:
                break
            found[number] = reference
        try:
            self._read |= zip(found, read_references(list(found.values())), strict=True)
        except DataError:
            for number, reference in found.items():
                self._read[number] = _alone(reference)


def _alone(reference: Reference) -> np.ndarray | Exception:
    try:
        return read_references([reference])[0]
    except DataError as error:
        return error


def _check_encoded(stored: np.ndarray, grid: np.ndarray, name: str, limits: _Limits | None) -> str:
    """Says what is wrong with the file of an image; "" for nothing. Without limits its grid is not checked."""
    try:
        with limited_memory():
            image = decode(stored.tobytes(), name)
        found = (grid[0].item(), grid[1].item())
        expected = _grid_nearest_to(found, image, name, limits) if limits else found
    except RejectedSample as rejected:
        return rejected.sentence
    # A frame of a video is stored in the size of its grid.
    if found != expected and (image.height, image.width) != (PATCH * found[0], PATCH * found[1]):
        return f"the image {name} has a grid of {expected}, not of {found}"
    return ""


def _grid_nearest_to(found: tuple[int, int], image: Image.Image, name: str, limits: _Limits) -> tuple[int, int]:
    """The grid that an image can have, which is ``found`` or the first that is not larger."""
    settings, sharing = limits

    def grid_among(images: int) -> tuple[int, int]:
        least = settings.min_pixels
        return image_grid(
            image, name, least, pixel_limit(least, settings.max_pixels, images, settings.shared_image_tokens)
        )

    def is_not_larger(images: int) -> bool:
        height, width = grid_among(images)
        return height <= found[0] and width <= found[1]

    # The more images share a limit, the smaller they are.
    first = bisect_left(sharing, True, key=is_not_larger)
    return grid_among(sharing[min(first, len(sharing) - 1)])
