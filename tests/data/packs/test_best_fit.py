"""Packing: no sample is lost, no pack is too long, records stay together, every epoch has new neighbours."""

import numpy as np
import pytest

from neo_megatron.data.packs.best_fit import best_fit
from neo_megatron.data.packs.index import PackTable, open_table
from neo_megatron.data.packs.units import Units, draw_share, units_of_shard
from neo_megatron.data.packs.writer import write_table


def draw(seed: int, count: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, high + 1, count).astype(np.int32)


@pytest.fixture
def table_of(tmp_path):
    """Packs samples of the given lengths, on disk and back."""

    def make(lengths: np.ndarray, capacity: int = 64) -> PackTable:
        files = write_table(tmp_path, Units.of_samples(lengths, lengths // 2), capacity)
        return open_table(tmp_path, files)

    return make


def epoch_of(table: PackTable, seed: int, epoch: int) -> list[list[int]]:
    """The samples of each pack of an epoch, whose units are single samples."""
    drawn = table.draw(seed, epoch, np.arange(len(table)))
    samples, ends = table.samples(drawn.units), drawn.offsets
    return [samples[start:end].tolist() for start, end in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize(("count", "high"), [(1, 64), (7, 64), (500, 64), (500, 20), (3000, 3), (2000, 40)])
def test_every_epoch_has_every_sample_once_and_no_pack_is_too_long(table_of, count, high):
    lengths = draw(0, count, high)
    table = table_of(lengths)
    for epoch in range(3):
        packs = epoch_of(table, 3, epoch)
        assert sorted(sum(packs, [])) == list(range(count))
        assert all(0 < lengths[members].sum() <= 64 for members in packs)


def test_same_seed_gives_same_packs_and_every_epoch_has_new_neighbours(table_of):
    table = table_of(draw(0, 20_000, 32))
    first, again, next_epoch, other = (epoch_of(table, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert first == again and len(first) == len(next_epoch) == len(other)

    def pairs(packs: list[list[int]]) -> set[tuple[int, int]]:
        return {(a, b) for members in packs for a in members for b in members if a < b}

    for others in (next_epoch, other):
        assert len(pairs(first) & pairs(others)) < 0.02 * len(pairs(first))


def test_a_single_pack_equals_that_of_the_complete_epoch(table_of):
    table = table_of(draw(1, 700, 50))
    epoch = epoch_of(table, 7, 2)
    for place in range(0, len(table), 13):
        assert table.samples(table.draw(7, 2, np.array([place])).units).tolist() == epoch[place]


def test_costs_are_those_of_the_documents_of_a_pack(table_of):
    lengths = draw(2, 300, 40)
    table = table_of(lengths)
    drawn = table.draw(0, 0, np.arange(len(table)))
    for members, cost in zip(epoch_of(table, 0, 0), table.costs(drawn).tolist(), strict=True):
        assert cost == [sum(int(lengths[m]) ** 2 for m in members), sum(int(lengths[m]) // 2 for m in members)]


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook algorithm, one sample at a time: number of packs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_there_are_no_more_packs_than_with_the_textbook_algorithm(seed):
    lengths = draw(seed, 400, 100)
    patterns = best_fit(np.bincount(lengths, minlength=129))
    assert sum(pattern.packs for pattern in patterns) == naive_best_fit_decreasing(lengths.tolist(), 128)


def test_packs_of_mixed_lengths_are_nearly_full(table_of):
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 1.0, 100_000), 20, 16384).astype(np.int32)
    assert lengths.sum() / (len(table_of(lengths, 16384)) * 16384) > 0.999


def test_lengths_beyond_sixteen_bits(table_of):
    lengths = np.array([70_000, 5, 70_000, 59_000], np.int32)
    packs = epoch_of(table_of(lengths, 130_000), 0, 0)
    assert sorted(sum(packs, [])) == [0, 1, 2, 3] and len(packs) == 2


def test_records_that_fit_into_a_pack_are_units(bench, new_sample):
    records = [[new_sample("q " * n, "a") for n in range(1 + number % 5)] for number in range(20)]
    records.insert(3, [new_sample("a", "b"), new_sample("w " * 200, "c"), new_sample("c", "d"), new_sample("e", "f")])
    shards = bench.preprocess(records, settings=type(bench.settings)(records_per_shard=6))
    undivided = [units_of_shard(shards.shard(number), 0, 100_000) for number in range(4)]
    assert [len(units) for units in undivided] == [6, 6, 6, 3]  # one for each record
    lengths = np.concatenate([shards.shard(number).tokens.lengths for number in range(4)])
    first = 0
    seen: list[int] = []
    for number in range(4):
        units = units_of_shard(shards.shard(number), first, 40)
        for start, samples, length, squares in zip(
            units.first, units.samples, units.lengths, units.squares, strict=True
        ):
            members = lengths[start : start + samples].astype(int)
            assert members.sum() == length <= 40 and (members**2).sum() == squares
            seen += range(start, start + samples)
        first += len(shards.shard(number).tokens.lengths)
    assert sorted(seen) == np.flatnonzero(lengths <= 40).tolist()
    assert first == len(shards)


@pytest.mark.parametrize(("share", "expected"), [("1/2", 50), ("1/3", 33), ("2", 200), ("5/2", 250), ("1/1000", 0)])
def test_a_share_takes_the_exact_number_of_units(share, expected):
    from fractions import Fraction

    taken = draw_share(100, Fraction(share), key=5)
    assert len(taken) == expected
    counts = np.bincount(taken, minlength=100)
    assert counts.max() - counts.min() <= 1
    if 0 < expected < 100:
        assert taken.tolist() != draw_share(100, Fraction(share), key=6).tolist()
