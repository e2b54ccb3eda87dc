"""The attention kernels behind one interface: FlexAttention on a GPU, tiles of matrix products on a CPU.

A mask is built once per micro-batch from the rule in `mask.py`; its form decides the kernel. NEO's queries and keys are
twice as wide as its values, which both take as they are.

Shape suffixes: S sequence, B packs, N query heads, G key-value heads, D head dimension.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from neo_megatron.model.mask import AttentionRule
from neo_megatron.model.tiled_attention import TiledAttention, TiledMask

AttentionMask = TiledMask | BlockMask

# Query and key rows of one FlexAttention block.
FLEX_BLOCK = (128, 128)


def build_mask(rule: AttentionRule, dtype: torch.dtype) -> AttentionMask:
    """The mask of a micro-batch in the form that its device's kernel takes, for queries and keys of this type."""
    if rule.document_BT.is_cuda:
        return rule.blocks(FLEX_BLOCK)
    return TiledMask.from_rule(rule, torch.promote_types(dtype, torch.float32))


def attend(query_SBN2D: Tensor, key_SBG2D: Tensor, value_SBGD: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Softmax attention with grouped queries -> ``[S, B, N * D]``; the names of the arguments are their shapes."""
    if isinstance(mask, TiledMask):
        return TiledAttention.apply(query_SBN2D, key_SBG2D, value_SBGD, mask, scale).flatten(2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBN2D, key_SBG2D, value_SBGD))
    context = _compiled_flex_attention()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return context.permute(2, 0, 1, 3).flatten(2)


@cache
def _compiled_flex_attention():
    # Uncompiled, FlexAttention holds the whole score matrix.
    return torch.compile(flex_attention, dynamic=False)
