"""The PyTorch data set of packs. Its state is one integer: item ``i`` depends on (packs, seed, batch, i) alone.

For a mixture, "packs" includes the phases of its schedule up to that item.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.image import PATCH_VALUES, decode, image_tokens, patches_from_image, recompress
from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.packs.balance import balanced_order
from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.packs.mixture_schedule import open_streams, pack_lengths
from neo_megatron.data.permutation import key_of
from neo_megatron.data.shards.reader import SAMPLE_MODALITIES, ShardSet, StoredSample, patches_of
from neo_megatron.data.shards.sample_checks import are_sound, what_is_wrong
from neo_megatron.errors import DataError, RejectedSample

LossWeighting = Literal["square", "sample", "token"]
_WEIGHT_POWER: dict[str, float] = {"square": -0.5, "sample": -1.0, "token": 0.0}
# "patches" returns them; "check" only finds out which images are broken; "none" does not read images.
Images = Literal["patches", "check", "none"]


@dataclass(frozen=True)
class GlobalBatch:
    """How the packs of a step are dealt to data-parallel ranks, so that all ranks have about the same work.

    Args:
        size: packs of a step.
        ranks: data-parallel ranks.
        micro_batch_size: packs in a micro-batch of one rank.
        start: packs consumed before, hence the number of the first pack that is read.
    """

    size: int
    ranks: int
    micro_batch_size: int
    start: int = 0


@dataclass(frozen=True)
class DrawnPack:
    """The samples of an item.

    Args:
        index: that they are numbered in.
        epoch: of the index.
        number: of the pack in the run, in the order drawn: the same however a global batch is dealt to ranks.
        samples: int64 [n].
    """

    index: PackIndex
    epoch: int
    number: int
    samples: np.ndarray

    def records(self) -> list[tuple[str, int]]:
        """Annotation file and record of each sample."""
        return list(map(self.index.data.describe, self.samples.tolist()))


class PackDataset(torch.utils.data.Dataset):
    """Packs in a random order; every epoch puts the samples into new packs.

    Attributes:
        packs: the directory of packs; of a mixture, the first.
        streams: all directories of packs.
        lengths: tokens of a pack, see `mixture_schedule.pack_lengths`.
        data_sets: names of the data sets of all streams, sorted; those of one name are one data set.
        has_images: whether any sample has an image.

    Args:
        location: written by ``neo-megatron pack``: a directory or ``s3://bucket/prefix``; or the file of a mixture, see
            `mixture_schedule`.
        num_samples: number of items; more than there are packs means several epochs. `None`: as many as all packs.
        seed: epoch e is packed and ordered by (seed, e).
        loss_weighting: weight of each of the n trained tokens of a sample: "square" 1/sqrt(n), "sample" 1/n, "token" 1.
        images: "patches" returns patches. A rank that embeds no images need not read them; but a rank that computes
            the loss has to "check" if they can be decoded, to agree with the embedding rank on which samples count.
        global_batch: balances the work of its ranks; without it items come in the order drawn.
        min_jpeg_quality: from 1 to 100. Below 100, every image of an encoded store is recompressed as JPEG, with a
            quality drawn from here to 100 for each (seed, epoch, sample, image).

    Raises:
        DataError: the packs cannot be opened, or ``min_jpeg_quality`` is out of range or does not fit the store.
    """

    def __init__(
        self,
        location: str | Path,
        num_samples: int | None,
        seed: int,
        loss_weighting: LossWeighting = "square",
        images: Images = "patches",
        global_batch: GlobalBatch | None = None,
        min_jpeg_quality: int = 100,
    ) -> None:
        self.streams, self._schedule = open_streams(location)
        self.packs = self.streams[0]
        self.lengths = pack_lengths(self.streams, self._schedule)
        shard_sets = [shards for stream in self.streams for shards in stream.data.sets]
        self.data_sets = tuple(sorted(set().union(*(shards.data_sets for shards in shard_sets))))
        self._num_samples = sum(map(len, self.streams)) if num_samples is None else num_samples
        self._seed = seed
        self._power = _WEIGHT_POWER[loss_weighting]
        self._images: Images = images
        self._batch = global_batch
        self._min_jpeg_quality = min_jpeg_quality
        if not 1 <= min_jpeg_quality <= 100:
            raise DataError(
                f"--min-jpeg-quality must be from 1 to 100, not {min_jpeg_quality}; 100 leaves images alone"
            )
        self.has_images = any(shards.manifest["counts"]["pictures"] for shards in shard_sets)
        stores = {shards.image_store for shards in shard_sets}
        if min_jpeg_quality < 100 and "patches" in stores:
            raise DataError(
                f"{location} keeps images as patches, which cannot be compressed as JPEG; "
                "preprocess with --image-store encoded, or leave out --min-jpeg-quality"
            )
        # To check patches there is nothing to read: any bytes are pixels.
        self._fetch_images = images == "patches" or (images == "check" and stores != {"patches"})
        self._window = -1
        self._window_packs: list[DrawnPack] = []

    def __len__(self) -> int:
        return self._num_samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_window": -1, "_window_packs": []}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One pack of T tokens, see `lengths`, with M targets and C image tokens, as CPU tensors.

        ``tokens`` int64 [T]; ``positions_thw`` int32 [T, 3]; ``document`` and ``image`` int32 [T], numbers within the
        pack, -1 for padding and outside images; ``target_index`` int64 [M], positions whose next token is trained;
        ``targets`` int64 [M], those next tokens; ``target_weight`` float32 [M], 0 in samples with a broken image;
        ``target_group`` int32 [M], (index in ``data_sets``) * 4 + (index in `SAMPLE_MODALITIES`) of their samples;
        ``image_token_index`` int64 [C], positions of the ``<IMG_CONTEXT>`` tokens; ``patches`` uint8 [C, 4, 768], 0
        for a broken image. In addition ``samples``, the number of samples, and ``broken``, a sentence for each broken
        one.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"item {index} is outside a data set of {self._num_samples} items")
        return self._assemble(self.pack(index))

    def describe(self, index: int) -> list[tuple[str, int]]:
        """Annotation file and record of each sample of an item."""
        return self.pack(index).records()

    def largest(self, first: int, count: int) -> int:
        """Upper bound, in bytes, of the tensors of any of ``count`` items from ``first`` on; no sample is read."""
        packs, costs = self._drawn(first, count)
        most = int(costs[:, 1].max())
        # Per token 28 bytes, and 20 more where it is trained; see `pack_tensors`.
        bytes_of_tokens = max(pack.index.sequence_length for pack in packs) * 48
        return bytes_of_tokens + most * (8 + 4 * PATCH_VALUES if self._images == "patches" else 0)

    def pack(self, index: int) -> DrawnPack:
        """The pack of an item; no sample is read."""
        # Complete global batches are looked up, because balancing needs them.
        size = self._batch.size if self._batch else 64
        start = self._batch.start % size if self._batch else 0
        window, place = divmod(index - start, size)
        if window != self._window:  # a cache, because drawing takes a millisecond; any item can still be asked for
            self._window, self._window_packs = window, self._draw(window * size + start, size)
        return self._window_packs[place]

    def _draw(self, first: int, count: int) -> list[DrawnPack]:
        """The packs of ``count`` consecutive items."""
        packs, costs = self._drawn(first, count)
        if self._batch is None:
            return packs
        order = balanced_order(costs, self._batch.ranks, self._batch.micro_batch_size)
        return [packs[number] for number in order.tolist()]

    def _drawn(self, first: int, count: int) -> tuple[list[DrawnPack], np.ndarray]:
        """The packs of ``count`` consecutive numbers, before balancing, and their costs: int64 [count, 2]."""
        if self._schedule is None:
            streams, numbers = np.zeros(count, np.int64), np.arange(first, first + count)
        else:
            streams, numbers = self._schedule.places(first, count)
        epochs = numbers // np.array(list(map(len, self.streams)))[streams]
        packs: dict[int, DrawnPack] = {}
        costs = np.empty((count, 2), np.int64)
        for stream, epoch in sorted(set(zip(streams.tolist(), epochs.tolist(), strict=True))):
            index = self.streams[stream]
            places = np.flatnonzero((streams == stream) & (epochs == epoch))
            drawn = index.table.draw(self._seed, epoch, numbers[places] % len(index))
            index.table.read_ahead(drawn)
            costs[places] = index.table.costs(drawn)
            ends = drawn.offsets.tolist()
            for place, start, end in zip(places.tolist(), ends, ends[1:], strict=False):
                packs[place] = DrawnPack(index, epoch, first + place, index.table.samples(drawn.units[start:end]))
        return [packs[place] for place in range(count)], costs

    def _assemble(self, pack: DrawnPack) -> dict[str, Any]:
        """The samples of a pack joined and padded, as ``__getitem__`` returns them."""
        samples, data = pack.samples.tolist(), pack.index.data
        length, ids = pack.index.sequence_length, data.ids
        fetched = data.fetch(samples, images=self._fetch_images)
        joined = self._tokens(pack, fetched)
        tokens = np.full(length, ids.pad, np.int64)
        tokens[: len(joined)] = joined
        # In shards of earlier versions, trained spans may contain images of assistant turns.
        text = (joined != ids.image_start) & (joined != ids.image_context) & (joined != ids.image_end)
        document = np.full(length, -1, np.int32)
        trained = np.zeros(length, bool)
        weight = np.zeros(length, np.float32)
        grids = np.concatenate([stored.grids for stored, _ in fetched])
        with_patches = self._images == "patches"
        patches = np.empty((int(image_tokens(grids).sum()) if with_patches else 0, 4, PATCH_VALUES), np.uint8)
        broken: list[str] = []
        end = last = 0
        for number, (sample, (stored, shards)) in enumerate(zip(samples, fetched, strict=True)):
            start, end = end, end + len(stored.tokens)
            document[start:end] = number
            for span_start, span_end in stored.spans.tolist():
                trained[start + span_start : start + span_end] = text[start + span_start : start + span_end]
            count = int(trained[start:end].sum())
            first, last = last, last + (int(image_tokens(stored.grids).sum()) if with_patches else 0)
            try:
                self._read_images(stored, shards, patches[first:last], key_of(self._seed, pack.epoch, sample))
                weight[start:end] = float(max(count, 1)) ** self._power
            except RejectedSample as rejected:
                patches[first:last] = 0
                file, record = data.describe(sample)
                broken.append(f"{file}, record {record}: {rejected.sentence}")
        groups = np.array([self._group(*data.data_set(sample)) for sample in samples], np.int32)
        targets = np.flatnonzero(trained)  # never the first token of a document, which is a turn's header
        tensors = pack_tensors(tokens, document, grids, ids, targets, weight[targets], patches)
        group = torch.from_numpy(groups[document[targets]])
        return {**tensors, "target_group": group, "samples": len(samples), "broken": broken}

    def _group(self, data_set: str, modality: int) -> int:
        return bisect_left(self.data_sets, data_set) * len(SAMPLE_MODALITIES) + modality

    def _tokens(self, pack: DrawnPack, fetched: Sequence[tuple[StoredSample, ShardSet]]) -> np.ndarray:
        """The tokens of the samples of a pack, int32 [n], once the files of the samples are known to be consistent.

        Raises:
            DataError: a file is damaged, so a sample cannot be used or the pack would be too long.
        """
        data, length = pack.index.data, pack.index.sequence_length
        ids, vocabulary = data.ids, data.tokenizer["size"]
        tokens = np.concatenate([stored.tokens for stored, _ in fetched])
        if len(tokens) > length:
            raise DataError(
                f"{pack.index.location} is damaged: a pack has {len(tokens)} tokens, more than {length}; "
                "check it with neo-megatron verify-data and pack again"
            )
        if are_sound([stored for stored, _ in fetched], tokens, ids, vocabulary):
            return tokens
        checked = ((what_is_wrong(stored, ids, vocabulary), number) for number, (stored, _) in enumerate(fetched))
        wrong, number = next(found for found in checked if found[0])
        shards = fetched[number][1]
        file, record = data.describe(int(pack.samples[number]))
        raise DataError(
            f"{shards.location} is damaged in the sample from {file}, record {record}: {wrong}; "
            "check it with neo-megatron verify-data and copy or preprocess it again"
        )

    def _read_images(self, stored: StoredSample, shards: ShardSet, out: np.ndarray, key: int) -> None:
        """Writes the patches of a sample to ``out``, or only checks that its images can be decoded.

        Args:
            out: uint8 [image tokens, 4, 768].
            key: of the augmentation.

        Raises:
            RejectedSample: for an image that cannot be decoded.
        """
        end = 0
        counts = image_tokens(stored.grids).tolist()
        for number, (data, grid, count) in enumerate(zip(stored.images, stored.grids.tolist(), counts, strict=False)):
            start, end = end, end + count
            if shards.image_store == "patches":
                if len(data) != count * 4 * PATCH_VALUES:
                    raise DataError(
                        f"{shards.location} is damaged: the patches of an image do not fit its grid; check it with "
                        "neo-megatron verify-data and copy or preprocess it again"
                    )
                if self._images == "patches":
                    out[start:end] = patches_of(data)
                continue
            with limited_memory():
                image = decode(data.tobytes(), f"number {number} of the sample")
            if self._images == "patches":
                if self._min_jpeg_quality < 100:
                    drawn = key_of(key, number) % (101 - self._min_jpeg_quality)
                    image = recompress(image, self._min_jpeg_quality + drawn)
                patches_from_image(image, (grid[0], grid[1]), out=out[start:end])


def pack_tensors(
    tokens: np.ndarray,
    document: np.ndarray,
    grids: np.ndarray,
    ids: SpecialIds,
    targets: np.ndarray,
    target_weight: np.ndarray,
    patches: np.ndarray,
) -> dict[str, Tensor]:
    """The tensors of a pack, see ``PackDataset.__getitem__``.

    Args:
        tokens, document, grids: see `native_positions`.
        targets: int [M], positions of the trained tokens.
        target_weight: float32 [M].
        patches: uint8 [C, 4, 768]; without any, ``image_token_index`` is empty too.
    """
    positions, image = native_positions(tokens, document, grids, ids)
    arrays = {
        "tokens": tokens,
        "positions_thw": positions,
        "document": document,
        "image": image,
        "target_index": targets - 1,
        "targets": tokens[targets],
        "target_weight": target_weight,
        "image_token_index": np.flatnonzero(image >= 0) if len(patches) else np.empty(0, np.int64),
        "patches": patches,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def native_positions(
    tokens: np.ndarray, document: np.ndarray, grids: np.ndarray, ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """(t, h, w) int32 [T, 3] and the number of the image int32 [T] of each token of a pack.

    ``t`` counts from 0 in each document: one step for a text token and one for all tokens of an image. ``h`` and ``w``
    are row and column in the merged grid of the image.

    Args:
        tokens, document: [T]; ``document`` is -1 in padding.
        grids: int [images, 2] in patches, in the order of the images.
    """
    real = document >= 0
    context = (tokens == ids.image_context) & real
    starts_image = np.zeros(len(tokens), bool)
    starts_image[1:] = context[1:] & (tokens[:-1] == ids.image_start)
    steps = np.cumsum(~context | starts_image)
    first = np.flatnonzero(np.diff(document, prepend=-1) * real)
    positions = np.zeros((len(tokens), 3), np.int32)
    positions[real, 0] = (steps[real] - steps[first][document[real]]).astype(np.int32)

    image = np.where(context, np.cumsum(starts_image) - 1, -1).astype(np.int32)
    sizes = image_tokens(grids)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = np.repeat(grids[:, 1] // 2, sizes)
    positions[context, 1] = within // columns
    positions[context, 2] = within % columns
    return positions, image


def collate(packs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins B packs to a micro-batch: per-token tensors stacked to [B, T, ...], the others concatenated.

    ``target_index`` and ``image_token_index`` count in the flattened [B * T]; documents and images are still numbered
    within each pack.
    """
    length = len(packs[0]["tokens"])
    batch: dict[str, Any] = {
        key: _stack([pack[key] for pack in packs]) for key in ("tokens", "positions_thw", "document", "image")
    }
    for key in ("target_index", "image_token_index"):
        batch[key] = torch.cat([pack[key] + row * length for row, pack in enumerate(packs)])
    for key in ("targets", "target_weight", "target_group", "patches"):
        if key not in packs[0]:  # packs that were not read from shards have no groups
            continue
        batch[key] = packs[0][key] if len(packs) == 1 else torch.cat([pack[key] for pack in packs])
    batch["samples"] = sum(pack["samples"] for pack in packs)
    batch["broken"] = [sentence for pack in packs for sentence in pack["broken"]]
    return batch


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors; does not copy the only one, since one pack is the usual micro-batch."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
