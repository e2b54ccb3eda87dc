"""Splits the tokens of packs over context-parallel ranks: equally many each, with about the same attention work.

Under all-gather a rank's work is the number of keys that its queries may see. In a long document late tokens see many
times what early ones see, so that contiguous parts would leave the first rank idle half of the time. Blocks of rows are
dealt out by their work instead; in complete blocks, because FlexAttention skips masked pairs by the block.

Runs on the CPU for every micro-batch, in time and memory linear in the number of tokens.
"""

from heapq import heappop, heappush
from math import gcd

import torch
from torch import Tensor

from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.mask import AttentionRule

# Rows of a FlexAttention block: dealt in these, a rank's rows mix no distant tokens in one block.
BLOCK = 128


def allowed_keys(document_BT: Tensor, image_BT: Tensor) -> Tensor:
    """Number of keys that each token sees under the rule of `mask.py`, int64 ``[B, T]``; padding sees itself."""
    seen = SeenKeys.of(AttentionRule(document_BT, image_BT))
    return (seen.end - seen.first).long()


def contiguous_rows(length: int, ranks: int) -> Tensor:
    """int64 ``[ranks, length / ranks]``: contiguous tokens. For all-to-all, whose work is even over heads."""
    return torch.arange(length).view(ranks, -1)


def even_rows(document_BT: Tensor, image_BT: Tensor, ranks: int) -> Tensor:
    """int64 ``[ranks, T / ranks]``, ascending rows of each rank: the same for all packs of the micro-batch.

    The block with most work goes to the rank with least of those that still have room; every rank computes the same.
    """
    length = document_BT.shape[1]
    size = gcd(length // ranks, BLOCK)
    work = allowed_keys(document_BT, image_BT).sum(dim=0).view(-1, size).sum(dim=1)
    room = length // ranks // size
    blocks: list[list[int]] = [[] for _ in range(ranks)]
    with_room = [(0, rank) for rank in range(ranks)]  # work so far; a heap
    for block in work.argsort(descending=True, stable=True).tolist():
        done, rank = heappop(with_room)
        blocks[rank].append(block)
        if len(blocks[rank]) < room:
            heappush(with_room, (done + int(work[block]), rank))
    first = torch.tensor(blocks).sort(dim=1).values * size
    return (first[:, :, None] + torch.arange(size)).flatten(1)
