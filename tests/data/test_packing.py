"""Packs: nothing lost, nothing over the length, groups together, the same for the same seed."""

import numpy as np
import pytest

from neo_megatron.data.packing import best_fit, pack


def draw(seed: int, count: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, high + 1, count).astype(np.int32)


def packs_of(samples: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [samples[start:end].tolist() for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


@pytest.mark.parametrize(("count", "high"), [(1, 64), (7, 64), (500, 64), (500, 20), (3000, 3), (2000, 40)])
def test_every_sample_once_and_no_pack_over_its_length(count, high):
    lengths = draw(0, count, high)
    samples, offsets = pack(lengths, np.arange(count), 64, seed=3)
    assert sorted(samples.tolist()) == list(range(count))
    assert offsets[0] == 0 and offsets[-1] == count and (np.diff(offsets) > 0).all()
    assert all(lengths[members].sum() <= 64 for members in packs_of(samples, offsets))


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
def test_packs_are_as_few_as_with_the_textbook_algorithm(seed):
    lengths = draw(seed, 400, 100)
    patterns = best_fit(np.bincount(lengths, minlength=129))
    assert sum(pattern.packs for pattern in patterns) == naive_best_fit_decreasing(lengths.tolist(), 128)


def test_fill_on_a_mix_of_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 1.0, 100_000), 20, 16384).astype(np.int32)
    _, offsets = pack(lengths, np.arange(len(lengths)), 16384, seed=0)
    assert lengths.sum() / ((len(offsets) - 1) * 16384) > 0.999


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_together_where_they_fit(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, 200)
    groups = np.repeat(np.arange(200), sizes)
    lengths = draw(seed, len(groups), 30)
    samples, offsets = pack(lengths, groups, 64, seed)
    assert sorted(samples.tolist()) == list(range(len(groups)))
    pack_of = np.empty(len(groups), int)
    pack_of[samples] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    for group in range(200):
        members = np.flatnonzero(groups == group)
        total = lengths[members].sum()
        spread = len(set(pack_of[members].tolist()))
        assert spread == 1 if total <= 64 else spread <= -(-total // 32)
    assert np.bincount(pack_of, lengths).max() <= 64


def test_same_seed_same_packs_and_another_seed_other_neighbours():
    lengths, groups = draw(0, 1000, 32), np.arange(1000)
    first, again, other = (packs_of(*pack(lengths, groups, 64, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other and len(first) == len(other)
    assert {tuple(members) for members in first} != {tuple(members) for members in other}
