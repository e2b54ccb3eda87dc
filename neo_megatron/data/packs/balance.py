"""Deals the packs of one global batch to data-parallel ranks so that every rank has about the same work.

Packs of one length differ in cost: attention works on the sum over documents of tokens squared, the patch embedding on
the image tokens. A step takes as long as the rank with the most work, so packs are redistributed within each global
batch. The packs of a batch, and with them the loss, stay the same.
"""

import numpy as np

_SWAPS = 64


def balanced_order(costs: np.ndarray, ranks: int, micro_batch_size: int) -> np.ndarray:
    """The order in which to read a global batch so that ranks have about the same work: int64 [packs].

    Args:
        costs: [packs, kinds], work of several kinds in any units; each kind is weighed relative to its mean.
        ranks: data-parallel ranks. Megatron's sampler gives each in turn ``micro_batch_size`` consecutive packs;
            ``packs`` is a multiple of ``ranks * micro_batch_size``.
        micro_batch_size: packs.
    """
    packs = len(costs)
    if ranks == 1 or packs <= ranks:
        return np.arange(packs)  # no choice: any order within a rank costs the same
    relative = costs / np.maximum(costs.mean(axis=0), 1)
    members = _deal(relative, ranks)
    _swap(relative, members)
    turns = members.reshape(ranks, -1, micro_batch_size)
    return turns.transpose(1, 0, 2).reshape(-1)


def imbalance(costs: np.ndarray, ranks: int, micro_batch_size: int) -> np.ndarray:
    """Largest-to-mean ratio of the ranks' work for packs in the order in which they are read: float64 [kinds]."""
    kinds = costs.shape[1]
    work = costs.reshape(-1, ranks, micro_batch_size, kinds).sum(axis=(0, 2), dtype=np.float64)
    return work.max(axis=0) / np.maximum(work.mean(axis=0), 1e-300)


def _deal(relative: np.ndarray, ranks: int) -> np.ndarray:
    """Deals costly packs first, each to the rank whose dominant work stays smallest: int64 [ranks, packs / ranks]."""
    each = len(relative) // ranks
    load = np.zeros((ranks, relative.shape[1]))
    taken = np.zeros(ranks, np.int64)
    members = np.empty((ranks, each), np.int64)
    for pack in np.argsort(-relative.sum(axis=1), kind="stable").tolist():
        after = (load + relative[pack]).max(axis=1)
        after[taken == each] = np.inf
        rank = int(after.argmin())
        members[rank, taken[rank]] = pack
        taken[rank] += 1
        load[rank] += relative[pack]
    return members


def _swap(relative: np.ndarray, members: np.ndarray) -> None:
    """Swaps packs between the ranks with the most and the least work while that makes them more equal."""
    load = relative[members].sum(axis=1)
    for _ in range(_SWAPS):
        most, least = int(load.max(axis=1).argmax()), int(load.sum(axis=1).argmin())
        # [packs of least, packs of most, kinds]: work that swapping two packs adds to `most`
        change = relative[members[least]][:, None] - relative[members[most]][None]
        larger = np.maximum((load[most] + change).max(axis=-1), (load[least] - change).max(axis=-1))
        theirs, ours = np.unravel_index(int(larger.argmin()), larger.shape)
        if most == least or larger[theirs, ours] >= load[most].max() - 1e-9:
            return
        load[most] += change[theirs, ours]
        load[least] -= change[theirs, ours]
        members[most, ours], members[least, theirs] = members[least, theirs], members[most, ours]
