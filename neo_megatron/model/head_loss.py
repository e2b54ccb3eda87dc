"""Cross entropy in chunks: the head runs on some trained positions at a time, and again in the backward.

A pack of 16,384 tokens may train on half of them; with 151,936 words their logits and probabilities would be 7 GB, more
than all activations of the layers. If they are few, they are kept, and nothing is computed twice.

Shape suffixes: M trained positions, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neo_megatron.model.config import LOGIT_BYTES


def in_chunks(head: Callable[[Tensor, Tensor], Tensor], rows_MH: Tensor, targets_M: Tensor, vocabulary: int) -> Tensor:
    """``head(rows, targets)`` -> cross entropy ``[M]``, called on as many positions as `LOGIT_BYTES` allow.

    Values and gradients are those of one call, except for the order in which the weight's gradient is summed.

    Args:
        vocabulary: logits of a position on this rank.
    """
    chunks = -(-len(rows_MH) // max(1, LOGIT_BYTES // (4 * vocabulary)))
    if chunks <= 1:
        return head(rows_MH, targets_M)
    parts = zip(rows_MH.tensor_split(chunks), targets_M.tensor_split(chunks), strict=True)
    # The head draws no random numbers, whose state would be fetched and set for every chunk.
    return torch.cat([checkpoint(head, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
