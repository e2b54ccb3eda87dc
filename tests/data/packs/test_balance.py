"""Ranks get about the same work, and every global batch keeps its packs."""

import numpy as np
import pytest

from neo_megatron.data.packs.balance import balanced_order, imbalance


def draw_costs(packs: int, seed: int = 0) -> np.ndarray:
    """Costs like those of packs of 16384 tokens, from many short documents to one long one, with random images."""
    random = np.random.default_rng(seed)
    return np.stack([random.lognormal(18, 0.6, packs), random.integers(4000, 16000, packs)], axis=1).astype(np.int64)


@pytest.mark.parametrize(
    ("packs", "ranks", "micro"), [(32, 8, 1), (64, 8, 2), (24, 3, 4), (8, 8, 1), (16, 1, 2), (8, 4, 2)]
)
def test_every_pack_is_read_once(packs, ranks, micro):
    order = balanced_order(draw_costs(packs), ranks, micro)
    assert sorted(order.tolist()) == list(range(packs))


@pytest.mark.parametrize("seed", range(5))
def test_both_kinds_of_work_are_balanced(seed):
    costs = draw_costs(64, seed)
    before, after = imbalance(costs, 8, 1), imbalance(costs[balanced_order(costs, 8, 1)], 8, 1)
    assert (after < before).all() and after.max() < 1.06


def test_imbalance_is_that_of_the_packs_megatrons_sampler_gives_a_rank():
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    costs = draw_costs(24)
    work = []
    for rank in range(3):
        batches = MegatronPretrainingSampler(24, 0, 2, rank, 3)
        work.append(costs[[number for batch in batches for number in batch]].sum(axis=0))
    expected = np.max(work, axis=0) / np.mean(work, axis=0)
    np.testing.assert_allclose(imbalance(costs, 3, 2), expected)


def test_packs_without_images_are_balanced():
    costs = draw_costs(32) * np.array([1, 0])
    assert imbalance(costs[balanced_order(costs, 8, 1)], 8, 1)[0] < imbalance(costs, 8, 1)[0]
