"""Groups the samples of shards into units, which are packed together.

A unit is a record if that fits into a pack, else as many neighbouring samples of it as fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from neo_megatron.data.permutation import shuffled
from neo_megatron.data.shards.reader import Shard

_CHUNK = 1 << 20  # units that are processed at once, because temporary arrays of all would take much memory


@dataclass(frozen=True)
class Units:
    """U units in the order of their samples.

    Args:
        first: int64 [U], number of the first sample.
        samples: int32 [U], number of consecutive samples.
        lengths: int32 [U], tokens.
        image_tokens: int32 [U], work of the patch embedding.
        squares: int64 [U], sum over samples of tokens squared: work of attention.
    """

    first: np.ndarray
    samples: np.ndarray
    lengths: np.ndarray
    image_tokens: np.ndarray
    squares: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def take(self, chosen: np.ndarray) -> "Units":
        """The units of the given numbers, or of a mask, in that order."""
        return Units(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: Sequence["Units"]) -> "Units":
        """The units of all parts, one part after another."""
        return Units(*(np.concatenate([getattr(part, name) for part in parts]) for name in Units.__dataclass_fields__))

    @staticmethod
    def of_samples(lengths: np.ndarray, image_tokens: np.ndarray) -> "Units":
        """Units of one sample each."""
        ones = np.broadcast_to(np.int32(1), len(lengths))
        return Units(np.arange(len(lengths)), ones, lengths, image_tokens, lengths.astype(np.int64) ** 2)


def units_of_shard(shard: Shard, first_sample: int, capacity: int) -> Units:
    """The units of a shard, without samples longer than ``capacity``.

    Args:
        shard: one shard.
        first_sample: the number of its first sample among all that are packed together.
        capacity: tokens of a pack.
    """
    shard.check_text()
    lengths = np.asarray(shard.tokens.lengths, np.int64)
    starts = _unit_starts(lengths, np.asarray(shard.tokens.documents[:-1]), capacity)
    lengths_of_units = np.add.reduceat(lengths, starts) if len(starts) else lengths
    units = Units(
        first=first_sample + starts,
        samples=np.diff(starts, append=len(lengths)).astype(np.int32),
        lengths=lengths_of_units.astype(np.int32),
        image_tokens=(np.add.reduceat(shard.image_tokens, starts) if len(starts) else lengths).astype(np.int32),
        squares=np.add.reduceat(lengths**2, starts) if len(starts) else lengths,
    )
    return units.take(lengths_of_units <= capacity)


def _unit_starts(lengths: np.ndarray, records: np.ndarray, capacity: int) -> np.ndarray:
    """First samples of units, where over-long samples are units of their own; ``records`` are those of records."""
    totals = np.add.reduceat(lengths, records) if len(records) else lengths
    ends = np.append(records[1:], len(lengths))
    further: list[int] = []
    for record in np.flatnonzero(totals > capacity).tolist():
        used = 0
        for sample in range(int(records[record]), int(ends[record])):
            if used and used + lengths[sample] > capacity:
                further.append(sample)
                used = 0
            used += int(lengths[sample])
    return np.sort(np.concatenate([records, np.array(further, np.int64)]))


def draw_share(count: int, share: Fraction, key: int, due: Fraction = Fraction(0)) -> np.ndarray:
    """Numbers of the units that a share of ``count`` units takes, ascending: int64 [n].

    Every unit is taken as often as the integer part of the share says; the remainder is drawn by ``key`` alone.

    Args:
        count: number of units.
        share: how often a unit is taken on average.
        key: of the draw.
        due: the sum of ``count * share`` over earlier draws; the total of all draws is rounded, so that the shares of
            many small data sets add up.
    """
    half = Fraction(1, 2)
    each, rest = divmod(int(due + count * share + half) - int(due + half), max(count, 1))
    times = np.full(count, each, np.int32)
    for start in range(0, count if rest else 0, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, count))
        times[index] += shuffled(index, count, key) < rest
    return np.repeat(np.arange(count), times)
