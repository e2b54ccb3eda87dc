"""The workload of real packs, measured on some of them."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.pack_index import PackIndex
from neo_megatron.planning.workload import Workload, mean_keys

PACKS = 64


def measure_packs(index: PackIndex, count: int = PACKS) -> Workload:
    """The mean of the first packs of the first epoch; no picture is read."""
    dataset = PackDataset(index.location, min(count, len(index)), seed=0, pictures="none")
    return measure_items(dataset[number] for number in range(len(dataset)))


def measure_items(items: Iterable[dict[str, Any]]) -> Workload:
    """The mean of packs as `PackDataset` gives them, or of micro-batches of one."""
    documents: list[int] = []
    images: list[int] = []
    packs = length = trained = 0
    for item in items:
        document, image = item["document"].numpy().ravel(), item["image"].numpy().ravel()
        length, packs, trained = len(document), packs + 1, trained + len(item["targets"])
        documents += np.bincount(document[document >= 0]).tolist()
        # Padding sees itself alone.
        documents += [1] * int((document < 0).sum())
        images += np.bincount(image[image >= 0]).tolist()
    tokens = packs * length
    return Workload(
        sequence_length=length,
        mean_keys=mean_keys(documents, images),
        picture_share=sum(images) / tokens,
        trained_share=trained / tokens,
        source=f"measured on {packs} packs",
    )
