"""Reads several data sets as one list of samples."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.shards.reader import ShardSet, StoredSample
from neo_megatron.errors import DataError


class Mixture:
    """Data sets one after another; a global sample number runs through all of them.

    Args:
        locations: directories of shards, in order.

    Raises:
        DataError: a data set cannot be opened, or they were tokenized with different tokenizers.
    """

    def __init__(self, locations: Sequence[str | Path]) -> None:
        self.sets = [ShardSet(location) for location in locations]
        self.starts = [0]
        for shards in self.sets:
            self.starts.append(self.starts[-1] + len(shards))
            if shards.manifest["tokenizer"] != self.tokenizer:
                raise DataError(
                    f"{locations[0]} and {shards.location} were made with different tokenizers; "
                    "preprocess one of them again"
                )

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def tokenizer(self) -> dict:
        """The entry of the manifests for the tokenizer: ``sha256``, ``size``, ``ids``."""
        return self.sets[0].manifest["tokenizer"]

    @property
    def ids(self) -> SpecialIds:
        """Ids of the control tokens."""
        return self.sets[0].ids

    def fetch(self, samples: Sequence[int], images: bool = True) -> list[tuple[StoredSample, ShardSet]]:
        """The samples of the given numbers, in their order, each with its data set."""
        owners = [self._owner(sample) for sample in samples]
        found: dict[int, StoredSample] = {}
        for number in sorted(set(owners)):
            local = [sample for sample, owner in zip(samples, owners, strict=True) if owner == number]
            stored = self.sets[number].fetch([sample - self.starts[number] for sample in local], images)
            found.update(zip(local, stored, strict=True))
        return [(found[sample], self.sets[owner]) for sample, owner in zip(samples, owners, strict=True)]

    def describe(self, sample: int) -> tuple[str, int]:
        """(annotation file, record number) that a sample came from."""
        number = self._owner(sample)
        return self.sets[number].describe(sample - self.starts[number])

    def _owner(self, sample: int) -> int:
        return bisect_right(self.starts, sample) - 1
