"""The views in which an evaluation shows its images: the own ones, those of other samples, and blank ones.

A model that looks at its images has a higher loss where they are wrong:

    delta-permuted   each image is the one of the same grid in the next sample of the pack that has such a grid
    delta-blank      each pixel is the mean colour of the normalisation, rounded to 8 bits: less than 0.01 after it

Both are (loss of the view - own loss) / own loss over the trained tokens of samples with images; of delta-permuted,
only over samples with an image that found a partner. Positions, text and masks stay as they are, because grids do. A
partner is of the same pack, so that every parallel layout takes the same.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, arange

from neo_megatron.data.image import IMAGE_MEAN
from neo_megatron.data.shards.reader import SAMPLE_MODALITIES

VIEWS = ("own", "permuted", "blank")
# Packs at the beginning of an evaluation of which attention to image tokens is measured.
MEASURED_PACKS = 4


class _Batches(Protocol):
    """See `loaders.MicroBatches`."""

    iterations: int
    has_images: bool

    def __next__(self) -> dict[str, Any]: ...


class Partners(NamedTuple):
    """Which image takes the place of which.

    Args:
        source: int64 ``[C]``, for each image token of a micro-batch the one whose patches it is given.
        exchanged: bool ``[B, T]``, tokens of samples with an image of another sample.
        with_images: bool ``[B, T]``, tokens of samples with images.
    """

    source: Tensor
    exchanged: Tensor
    with_images: Tensor


class ViewedBatches:
    """Micro-batches of an evaluation, those of every iteration once in each view.

    Each also has ``view``, its index in `VIEWS`; a ``target_group`` to which `groups_of_views` adds; in the own view
    ``samples_with_images`` and ``without_partner``, numbers of trained samples; and ``measured_index``, the part of
    ``target_index`` whose attention to image tokens is measured.

    Args:
        batches: of this rank.
        micro_batches: of an iteration on this rank.
        rank, ranks: of the data-parallel group, to which packs are dealt as `EvaluationSampler` does.

    Attributes:
        iterations: of an evaluation, without views.
        views: how many there are: one where no data set has images.
    """

    def __init__(self, batches: _Batches, micro_batches: int, rank: int, ranks: int) -> None:
        self.iterations = batches.iterations
        self.views = len(VIEWS) if batches.has_images else 1
        self._batches, self._micro_batches = batches, micro_batches
        self._rank, self._ranks = rank, ranks
        self._viewed = self._view()

    def __iter__(self) -> "ViewedBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._viewed)

    def _view(self) -> Iterator[dict[str, Any]]:
        while True:
            for iteration in range(self.iterations):
                read = deque(next(self._batches) for _ in range(self._micro_batches))
                for view in range(self.views):
                    for number, packs in enumerate(read):
                        before = (iteration * self._micro_batches + number) * self._ranks + self._rank
                        measured = MEASURED_PACKS - before * len(packs["tokens"])
                        yield viewed(packs, view, measured)


def viewed(packs: dict[str, Any], view: int, measured: int) -> dict[str, Any]:
    """A micro-batch in a view, see `ViewedBatches`.

    Args:
        measured: how many of its first packs are measured; negative counts as 0.
    """
    partners = partners_of(packs)
    index = packs["target_index"]
    exchanged, with_images = partners.exchanged.flatten()[index], partners.with_images.flatten()[index]
    group = packs["target_group"] + (2 * view + exchanged.int()) * len(packs["data_sets"]) * len(SAMPLE_MODALITIES)
    more: dict[str, Any] = {"view": view, "target_group": group}
    if len(packs["patches"]):  # this rank embeds them
        if VIEWS[view] == "permuted":
            more["patches"] = packs["patches"][partners.source]
        elif VIEWS[view] == "blank":
            more["patches"] = blank_patches(packs["patches"])
    if view == 0:
        length = packs["tokens"].shape[1]
        trained = packs["target_weight"] > 0
        sample = index // length * length + packs["document"].flatten()[index]
        more["samples_with_images"] = len(sample[trained & with_images].unique())
        more["without_partner"] = len(sample[trained & with_images & ~exchanged].unique())
        more["measured_index"] = index[trained & with_images & (index < measured * length)]
    return {**packs, **more}


def blank_patches(patches_C4V: Tensor) -> Tensor:
    """uint8 patches, channel-first, of the mean colour."""
    mean = torch.tensor([round(255 * mean) for mean in IMAGE_MEAN], dtype=torch.uint8)
    return mean.repeat_interleave(patches_C4V.shape[-1] // len(mean)).expand_as(patches_C4V).contiguous()


def partners_of(packs: dict[str, Any]) -> Partners:
    """The partners of a micro-batch that is not yet split over context-parallel ranks."""
    image, document = packs["image"], packs["document"]
    sources: list[Tensor] = []
    exchanged, with_images = torch.zeros_like(image, dtype=torch.bool), torch.zeros_like(image, dtype=torch.bool)
    count = 0
    for pack in range(len(image)):
        tokens = (image[pack] >= 0).nonzero().flatten()
        sizes = image[pack][tokens].unique_consecutive(return_counts=True)[1]
        ends = sizes.cumsum(dim=0)
        last = tokens[ends - 1]  # of each image; its row and column are the largest
        rows, columns = packs["positions_thw"][pack][last, 1:].unbind(dim=1)
        documents = document[pack][last].tolist()
        # Grid -> sample -> first image tokens of its images.
        found: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        starts = (ends - sizes).tolist()
        for row, column, sample, start in zip(rows.tolist(), columns.tolist(), documents, starts, strict=True):
            found[row, column][sample].append(start)
        source = arange(len(tokens))
        for (row, column), samples in found.items():
            size = (row + 1) * (column + 1)
            donors = [*list(samples.values())[1:], next(iter(samples.values()))]
            for (sample, images), donor in zip(samples.items(), donors, strict=True):
                if len(samples) > 1:
                    exchanged[pack] |= document[pack] == sample
                    for number, start in enumerate(images):
                        given = donor[number % len(donor)]
                        source[start : start + size] = arange(given, given + size)
        with_images[pack] = torch.isin(document[pack], document[pack][last])
        sources.append(source + count)
        count += len(tokens)
    return Partners(torch.cat(sources), exchanged, with_images)
