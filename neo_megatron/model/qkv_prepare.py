"""Projections -> queries, keys and values: six norms, three rotations and their concatenation.

On a GPU they are one compiled function, forward and backward: the projections are read and the heads are written once
(done one after another, each of the six parts makes three passes). On a CPU, where compiling takes minutes, every part
has functions with a backward of their own.

Shape suffixes: S sequence, B packs, G key-value heads of this rank, R query heads per key-value head, D head dimension.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from neo_megatron.model.compiled import compiled
from neo_megatron.model.cpu_kernels.rms_norm import CpuRMSNorm
from neo_megatron.model.native_rope import NativeRotary

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


def query_key_value(
    qkv: Tensor,
    qk_hw: Tensor,
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    rotary: NativeRotary,
    eps: float,
) -> QueryKeyValue:
    """``[S, B, G * R, 2D]``, ``[S, B, G, 2D]`` and ``[S, B, G, D]``, normalised and rotated.

    Args:
        qkv: ``[S, B, G, R + 2, D]``, per key-value head its query heads for t, its key head for t, its value.
        qk_hw: ``[S, B, G, R + 1, D]``, query heads and key head, each ``[h half | w half]``.
        query_norms, key_norms: weights of the norms for t ``[D]``, h and w ``[D / 2]``.
    """
    if not qkv.is_cuda:
        return _part_by_part(qkv, qk_hw, query_norms, key_norms, rotary, eps)
    tables = tuple((table.cos, table.sin) for table in rotary.tables)
    return _compiled()(qkv, qk_hw, tuple(query_norms), tuple(key_norms), tables, eps)


def _part_by_part(
    qkv: Tensor,
    qk_hw: Tensor,
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    rotary: NativeRotary,
    eps: float,
) -> QueryKeyValue:
    def normalised(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        return [CpuRMSNorm.apply(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]

    query, key, value = _parts(qkv, qk_hw)
    return (
        rotary.rotate(*normalised(query, query_norms)),
        rotary.rotate(*normalised(key, key_norms)),
        value.flatten(2, 3),
    )


@cache
def _compiled():
    return compiled(at_once, fullgraph=True)


def at_once(
    qkv: Tensor,
    qk_hw: Tensor,
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    tables: Sequence[tuple[Tensor, Tensor]],
    eps: float,
) -> QueryKeyValue:
    """The compiled function: `query_key_value`, in float32 from the projections to the heads.

    Args:
        tables: cosine and sine for t, h and w, each ``[S, B, 1, 1, width / 2]``.
    """

    def heads(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        halves = []
        for part, weight, (cos, sin) in zip(parts, weights, tables, strict=True):
            exact = part.to(torch.promote_types(part.dtype, torch.float32))
            normal = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps) * weight
            first, second = normal.chunk(2, dim=-1)
            halves += [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(halves, dim=-1).to(qkv.dtype).flatten(2, 3)

    query, key, value = _parts(qkv, qk_hw)
    # Values are copied, so that the backward writes the gradient of the entire projection in one go.
    return heads(query, query_norms), heads(key, key_norms), value.flatten(2, 3).contiguous()


def _parts(qkv: Tensor, qk_hw: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Queries and keys for t, h and w, ``[S, B, G, R, D]`` or half as wide, with R = 1 for keys; and the values."""
    heads = qk_hw.shape[-2] - 1
    q_t, k_t, value = qkv.split((heads, 1, 1), dim=-2)
    q_hw, k_hw = qk_hw.split((heads, 1), dim=-2)
    return (q_t, *q_hw.chunk(2, dim=-1)), (k_t, *k_hw.chunk(2, dim=-1)), value
