"""The shards that a manifest lists, as arrays: parsed objects of 42,000 shards would take 180 MB in every process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neo_megatron.data.manifest_schema import expected_files


@dataclass(frozen=True)
class ShardEntry:
    """The entry of a shard in a manifest, without checksums.

    Args:
        name: of the shard.
        samples, images, media: rows of its arrays.
        sizes: of its files, name -> bytes.
    """

    name: str
    samples: int
    images: int
    media: int
    sizes: dict[str, int]


class ShardEntries(Sequence[ShardEntry]):
    """All shards of a manifest, in order.

    Attributes:
        samples: int64 [shards], of each shard.

    Args:
        entries: ``shards`` of a checked manifest.
        version: of the format.
    """

    def __init__(self, entries: Sequence[dict[str, Any]], version: int) -> None:
        self._kinds = sorted(expected_files("", version))  # of files, with the dot after the name of a shard
        self._numbers = np.array([int(entry["name"]) for entry in entries], np.int64)
        self.samples = np.array([entry["samples"] for entry in entries], np.int64)
        self._images = np.array([entry["pictures"] for entry in entries], np.int64)
        self._media = np.array([entry.get("media", 0) for entry in entries], np.int64)  # version 2 has none
        sizes = (entry["files"][f"{entry['name']}{kind}"]["bytes"] for entry in entries for kind in self._kinds)
        self._sizes = np.fromiter(sizes, np.int64).reshape(len(entries), len(self._kinds))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> ShardEntry:  # type: ignore[override]  # no slices
        name = shard_name(self._numbers.item(number))
        sizes = {f"{name}{kind}": size for kind, size in zip(self._kinds, self._sizes[number].tolist(), strict=True)}
        samples, images, media = (rows.item(number) for rows in (self.samples, self._images, self._media))
        return ShardEntry(name, samples, images, media, sizes)


def shard_name(number: int) -> str:
    """The name of a shard, with which the names of its files begin."""
    return f"{number:05d}"
