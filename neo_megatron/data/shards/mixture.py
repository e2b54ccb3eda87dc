"""Reads several data sets as one list of samples."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.config import ChatLayout
from neo_megatron.data.shards.reader import ShardSet, StoredSample
from neo_megatron.errors import DataError


class Mixture:
    """Data sets one after another; a global sample number runs through all of them.

    Args:
        locations: directories of shards, in order.

    Raises:
        DataError: a data set cannot be opened, or they were tokenized with different tokenizers or chat layouts.
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
        check_layouts(self.sets, "")

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def tokenizer(self) -> dict:
        """The entry of the manifests for the tokenizer: ``sha256``, ``size``, ``ids``."""
        return self.sets[0].manifest["tokenizer"]

    @property
    def chat_layout(self) -> ChatLayout | None:
        """The layout of the conversations; None if there are only documents."""
        return next((shards.chat_layout for shards in self.sets if shards.chat_layout), None)

    @property
    def location(self) -> str:
        """The data set that decides the layout."""
        return next((str(shards.location) for shards in self.sets if shards.chat_layout), str(self.sets[0].location))

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

    def data_set(self, sample: int) -> tuple[str, int]:
        """See `ShardSet.data_set`."""
        number = self._owner(sample)
        return self.sets[number].data_set(sample - self.starts[number])

    def _owner(self, sample: int) -> int:
        return bisect_right(self.starts, sample) - 1


def check_layouts(data: Sequence["ShardSet | Mixture"], where: str) -> None:
    """Checks that all conversations have one chat layout: two would teach contradictory beginnings of an answer.

    Args:
        data: documents have no layout and go with any.
        where: in front of the message.

    Raises:
        DataError: two differ; the text names them.
    """
    chats = [one for one in data if one.chat_layout]
    for other in chats[1:]:
        if other.chat_layout != chats[0].chat_layout:
            raise DataError(
                f"{where}{chats[0].location} was made with --chat-layout {chats[0].chat_layout}, {other.location} with "
                f"{other.chat_layout}, so that answers begin in two ways; preprocess one of them again"
            )
