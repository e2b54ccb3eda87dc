"""Permutations: every item once, the same for the same key, and all equally likely."""

from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import pytest

from neo_megatron.data.permutation import key_of, permutation, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100, 1023, 4097, 100_000])
def test_every_item_occurs_once(count):
    for order in (permutation(count, 1, "a"), shuffled(np.arange(count), count, key_of(1, "a"))):
        assert sorted(order.tolist()) == list(range(count))


def test_a_single_position_equals_that_of_the_permutation():
    permuted = shuffled(np.arange(1000), 1000, key_of(5))
    assert [int(shuffled(np.array([place]), 1000, key_of(5))[0]) for place in range(0, 1000, 97)] == permuted[
        ::97
    ].tolist()
    mixed = shuffled(np.array([3, 3, 0]), np.array([1000, 50, 1]), np.array([key_of(5), key_of(6), 0], np.uint64))
    assert mixed.tolist() == [permuted[3], shuffled(np.arange(50), 50, key_of(6))[3], 0]


def test_the_orders_of_a_key_never_change():
    """A run that is resumed with a later release must continue where it was."""
    assert shuffled(np.arange(10), 10, key_of(1234, 0, "packs")).tolist() == [5, 1, 2, 8, 7, 4, 9, 6, 0, 3]
    assert permutation(8, 1234, "x").tolist() == [1, 5, 6, 3, 4, 0, 7, 2]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(count):
    keys = np.array([key_of(number) for number in range(24_000)], np.uint64)
    orders = np.stack([shuffled(np.full(len(keys), place), count, keys) for place in range(count)], axis=1)
    seen = Counter(map(tuple, orders.tolist()))
    expected = len(keys) / factorial(count)
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in permutations(range(count)))
    freedom = factorial(count) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_neighbours_are_spread_randomly():
    count = 100_000
    order = shuffled(np.arange(count), count, key_of(3))
    steps = np.unique(np.diff(order) % count)
    assert abs(len(steps) / count - (1 - np.exp(-1))) < 0.01
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.02
