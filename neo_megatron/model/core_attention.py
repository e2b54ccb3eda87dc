"""The attention kernels behind one interface: FlexAttention on a GPU, SDPA on a CPU.

A mask is built once per micro-batch from the rule in `mask.py`; its form decides the kernel. NEO's queries and keys are
twice as wide as its values, which FlexAttention takes as they are.

Shape suffixes: S sequence, B packs, N query heads, G key-value heads, D head dimension.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from neo_megatron.model.mask import AttentionRule

AttentionMask = Tensor | BlockMask

# Query and key rows of one FlexAttention block.
FLEX_BLOCK = (128, 128)


def build_mask(rule: AttentionRule, dtype: torch.dtype) -> AttentionMask:
    """The mask of a micro-batch in the form its device's kernel takes: ``BlockMask``, or ``[B, 1, Q, K]`` to add."""
    if rule.document_BT.is_cuda:
        return rule.blocks(FLEX_BLOCK)
    dense = rule.dense()[:, None]
    return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill(~dense, -torch.inf)


def attend(query_SBN2D: Tensor, key_SBG2D: Tensor, value_SBGD: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Softmax attention with grouped queries -> ``[S, B, N * D]``; the names of the arguments are their shapes."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBN2D, key_SBG2D, value_SBGD))
    if isinstance(mask, BlockMask):
        context = _compiled_flex_attention()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    else:
        # The fused CPU kernel wants values as wide as queries; without it the score matrix is kept for the backward.
        width = value.shape[-1]
        value = pad(value, (0, query.shape[-1] - width))
        context = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        context = context[..., :width]
    return context.permute(2, 0, 1, 3).flatten(2)


@cache
def _compiled_flex_attention():
    # Uncompiled, FlexAttention holds the whole score matrix.
    return torch.compile(flex_attention, dynamic=False)
