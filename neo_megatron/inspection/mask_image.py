"""Draws the attention mask of a pack as an image, by blocks of tokens."""

import numpy as np
import torch

from neo_megatron.model.mask import AttentionRule

NONE, SOME, ALL = 0, 1, 2


def mask_levels(document: np.ndarray, image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [n, n], n at most ``side``: whether no, some or all queries of a block (row) see keys of another (column).

    One row of blocks is computed at a time, so memory grows with the length of a pack and not with its square.

    Args:
        document, image: int32 [T], as `AttentionRule` takes them.
        side: blocks in a row, at most.
    """
    length = len(document)
    block = -(-length // side)
    starts = np.arange(0, length, block)
    rule = AttentionRule(torch.from_numpy(document)[None], torch.from_numpy(image)[None])
    keys = torch.arange(length)
    levels = np.empty((len(starts), len(starts)), np.uint8)
    for row, start in enumerate(starts.tolist()):
        queries = torch.arange(start, min(start + block, length))
        seen = rule.allows(0, queries[:, None], keys[None, :]).numpy()
        some = np.logical_or.reduceat(seen.any(axis=0), starts)
        every = np.logical_and.reduceat(seen.all(axis=0), starts)
        levels[row] = np.where(every, ALL, np.where(some, SOME, NONE))
    return levels
