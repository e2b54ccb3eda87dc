"""The workload of real packs, measured on some of them."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.mixture_schedule import longest_packs
from neo_megatron.planning.workload import Workload, allowed_pairs

PACKS = 64


@dataclass(frozen=True)
class PackCounts:
    """Counts of pack contents that decide the work; counts of several packs add up.

    Args:
        tokens: of all packs, padding included.
        image_tokens: tokens of images.
        trained: positions whose next token is trained.
        pairs: of query and key that the mask allows; padding sees itself alone.
    """

    packs: int = 0
    tokens: int = 0
    padding: int = 0
    image_tokens: int = 0
    trained: int = 0
    pairs: int = 0

    def __add__(self, other: "PackCounts") -> "PackCounts":
        return PackCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def workload(self, source: str = "given") -> Workload:
        """The mean pack."""
        return Workload(
            sequence_length=self.tokens // self.packs,
            mean_keys=self.pairs / self.tokens,
            image_share=self.image_tokens / self.tokens,
            trained_share=self.trained / self.tokens,
            source=source,
        )


def count_packs(item: dict[str, Any]) -> PackCounts:
    """Counts of a pack of `PackDataset`, or of a micro-batch of `collate`."""
    rows = [np.atleast_2d(item[name].numpy()) for name in ("document", "image")]
    pairs = padding = image_tokens = 0
    for document, image in zip(*rows, strict=True):
        documents = np.bincount(document[document >= 0]).tolist()
        images = np.bincount(image[image >= 0]).tolist()
        empty = len(document) - sum(documents)
        pairs += allowed_pairs(documents, images) + empty
        padding += empty
        image_tokens += sum(images)
    return PackCounts(len(rows[0]), rows[0].size, padding, image_tokens, len(item["targets"]), pairs)


def measure_packs(location: str | Path, count: int = PACKS) -> Workload:
    """The mean of the first packs of a directory or a mixture, or of its longest packs; no image is read."""
    dataset = PackDataset(location, None, seed=0, images="none")
    first = longest_packs(dataset.lengths)[0]
    ends = [start for start, _ in dataset.lengths if start > first]
    last = min([first + min(count, len(dataset)), *ends])
    dataset = PackDataset(location, last, seed=0, images="none")
    return measure_items(dataset[number] for number in range(first, last))


def measure_items(items: Iterable[dict[str, Any]]) -> Workload:
    """The mean of items of `PackDataset`, or of micro-batches of them."""
    counts = sum(map(count_packs, items), PackCounts())
    return counts.workload(f"measured on {counts.packs} packs")
