"""Splits records into training and held-out records so that no image or video file is on both sides.

Records are the nodes of a graph; two records that use the same file are connected by an edge. A connected component is
never divided. It is drawn by a hash of its smallest file identity; a record without media is a component of its own,
drawn by the hash of its text. The result depends on the set of records alone, not on their order, nor on the number of
shards or workers.

Only records with several files link components, so only their identities are held in memory. A record with one file
that is not used by any of them needs only its own row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from neo_megatron.data.permutation import mix
from neo_megatron.data.shards.reader import Shard, ShardSet
from neo_megatron.errors import DataError

SplitBy = Literal["path", "content"]
_BUCKET_BITS = 16


@dataclass(frozen=True)
class _Links:
    """Components that are connected by records with several files.

    Args:
        files: uint64 [F], identities of their files, ascending.
        component: int64 [F], index in ``files`` of the smallest identity in the same component.
    """

    files: np.ndarray
    component: np.ndarray

    def find(self, files: np.ndarray) -> np.ndarray:
        """Index in ``files`` of the smallest identity of the component, -1 for a file that links nothing: int64 [n]."""
        if not len(self.files):
            return np.full(len(files), -1)
        places = np.minimum(np.searchsorted(self.files, files), len(self.files) - 1)
        return np.where(self.files[places] == files, self.component[places], -1)


class Split:
    """The held-out records of several data sets.

    A component with more records than the held-out part is to have stays in training, and the others are drawn with a
    correspondingly higher probability, so that the part still comes close to ``share`` of all records.

    Args:
        sets: all data sets that are packed together.
        share: of all their records, below 1.
        by: a file is identified by its resolved path, or by its content.

    Attributes:
        records: number of records of all data sets.
        linked: records that share a component with a record of several files.
        largest: records of the largest such component.
        kept: records of the components that are too large to hold out.

    Raises:
        DataError: a data set was written before shards stored the identities of files.
    """

    def __init__(self, sets: Sequence[ShardSet], share: Fraction, by: SplitBy) -> None:
        for shards in sets:
            if shards.version < 3:
                raise DataError(
                    f"{shards.location} does not list the image files of its samples (shard format {shards.version}), "
                    "so no records of it can be held out; preprocess it again, or pack without --held-out"
                )
        self._by = by
        self._links = _Links(*_connect(*_edges(sets, by)))
        self.records = self.linked = 0
        buckets = np.zeros(1 << _BUCKET_BITS, np.int64)
        sizes = np.zeros(len(self._links.files), np.int64)
        for shard in _shards(sets):
            draws, components = self._draws(shard)
            self.records += len(draws)
            linked = components[components >= 0]
            self.linked += len(linked)
            sizes += np.bincount(linked, minlength=len(sizes))
            buckets += np.bincount((draws >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64), minlength=len(buckets))
        self.largest = int(sizes.max(initial=0))
        self._too_large, self.kept = self._find_too_large(sets, buckets, math.ceil(share * self.records))
        others = self.records - self.kept
        # At most all others: the part may be smaller than asked for, but exceeds it only by the variance of the draw.
        self._limit = min(int(share * self.records / others * 2**64), 2**64 - 1) if others else 0

    def held_samples(self, shard: Shard) -> np.ndarray:
        """Whether each sample of a shard is held out, bool [samples]; samples of a record stay together."""
        draws, _ = self._draws(shard)
        held = (draws < np.uint64(self._limit)) & ~np.isin(draws, self._too_large)
        return np.repeat(held, np.diff(shard.tokens.documents))

    def report(self) -> dict[str, Any]:
        """The entry ``split`` of a manifest."""
        return {
            "by": self._by,
            "records": self.records,
            "linked_records": self.linked,
            "largest_group": self.largest,
            "kept_in_training": self.kept,
        }

    def _draws(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """For each record of a shard: a draw, uint64, uniform and equal within a component; and `_Links.find`."""
        starts = np.asarray(shard.tokens.documents[:-1])
        # The sum is the sample's own number where a record has one sample.
        draws = np.add.reduceat(shard.samples["key"], starts)
        components = np.full(len(starts), -1)
        records, first, files = _files_of_records(shard, self._by)
        if len(records):
            smallest = np.minimum.reduceat(files, first)
            components[records] = self._links.find(smallest)
            linked = components[records] >= 0
            smallest[linked] = self._links.files[components[records][linked]]
            draws[records] = mix(smallest)  # mixed, because the smallest of many is not uniform
        return draws, components

    def _find_too_large(self, sets: Sequence[ShardSet], buckets: np.ndarray, most: int) -> tuple[np.ndarray, int]:
        """Draws of the components with more than ``most`` records, uint64 [n] ascending, and their records.

        Only draws that share their leading bits with more than ``most`` records are counted one by one.
        """
        crowded = buckets > most
        found = [np.empty(0, np.uint64)]
        for shard in _shards(sets) if crowded.any() else ():
            draws, _ = self._draws(shard)
            found.append(draws[crowded[(draws >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64)]])
        draws, counts = np.unique(np.concatenate(found), return_counts=True)
        return draws[counts > most], int(counts[counts > most].sum())


def _shards(sets: Sequence[ShardSet]) -> Iterator[Shard]:
    for shards in sets:
        for shard in map(shards.shard, range(len(shards.entries))):
            shard.check_text()
            yield shard


def _files_of_records(shard: Shard, by: SplitBy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(records with files, int64 [r]; index of the first file of each, int64 [r]; all files, uint64)."""
    owners = np.searchsorted(shard.tokens.documents, shard.media["sample"], side="right") - 1
    records, first = np.unique(owners, return_index=True)
    return records, first, shard.media[by]


def _edges(sets: Sequence[ShardSet], by: SplitBy) -> tuple[np.ndarray, np.ndarray]:
    """Edges between the smallest file of each record with several files and its other files: uint64 [E] each."""
    ends: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]
    for shard in _shards(sets):
        records, first, files = _files_of_records(shard, by)
        if len(records):
            smallest = np.repeat(np.minimum.reduceat(files, first), np.diff(first, append=len(files)))
            ends.append((smallest[files != smallest], files[files != smallest]))
    smaller, larger = (np.concatenate(column) for column in zip(*ends, strict=True))
    return smaller, larger


def _connect(smaller: np.ndarray, larger: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of a graph given by its edges: the arrays of `_Links`.

    Each round hooks every root to the smallest adjacent root and then flattens the trees (Shiloach and Vishkin 1982).
    Identities are hashes, so their order is random and few rounds are needed.
    """
    files = np.unique(np.concatenate([smaller, larger]))
    component = np.arange(len(files))
    a, b = np.searchsorted(files, smaller), np.searchsorted(files, larger)
    while len(a):
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(component, high, low)
        while not np.array_equal(component, further := component[component]):
            component = further
        a, b = component[low], component[high]
        apart = a != b
        a, b = a[apart], b[apart]
    return files, component
