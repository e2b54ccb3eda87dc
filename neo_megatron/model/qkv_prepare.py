"""Projections -> queries, keys and values: norms, three rotations and their concatenation.

On a GPU they are one Triton kernel, forward and backward: the projections are read and the heads are written once. On a
CPU every part has functions with a backward of their own. `at_once` is the reference of both.

Shape suffixes: S sequence, B packs, G key-value heads of this rank, R query heads per key-value head, X channels of
queries and keys, D of values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neo_megatron.model.cpu_kernels.rms_norm import CpuRMSNorm
from neo_megatron.model.native_rope import NativeRotary

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


def query_key_value(
    projections: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    rotary: NativeRotary,
    eps: float,
) -> QueryKeyValue:
    """``[S, B, G * R, X]``, ``[S, B, G, X]`` and ``[S, B, G, D]``, normalised and rotated.

    Args:
        projections: ``[S, B, G, R + 2, D]``, per key-value head its query heads, its key and its value. In the form
            ``separate`` these are for t, and a second one has ``[S, B, G, R + 1, D]``: query heads and key, each
            ``[h half | w half]``. In the form ``in-head`` a head is ``[t half | h quarter | w quarter]``.
        query_norms, key_norms: weights of the norms: for t, h and w, or for t and for h and w together.
    """
    if not projections[0].is_cuda:
        return _part_by_part(projections, query_norms, key_norms, rotary, eps)
    # Not every PyTorch has Triton: those for CPUs come without it.
    from neo_megatron.model.gpu_kernels.norm_rotary import NormRotary

    tables = tuple((table.cos, table.sin) for table in rotary.tables)
    return NormRotary.apply(tables, eps, *projections, *query_norms, *key_norms)


def _part_by_part(
    projections: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    rotary: NativeRotary,
    eps: float,
) -> QueryKeyValue:
    def heads(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        normalised = [CpuRMSNorm.apply(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]
        return rotary.rotate(*_axes(normalised))

    query, key, value = _parts(projections)
    return heads(query, query_norms), heads(key, key_norms), value.flatten(2, 3)


def at_once(
    projections: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    tables: Sequence[tuple[Tensor, Tensor]],
    eps: float,
) -> QueryKeyValue:
    """`query_key_value` written down, in float32 from the projections to the heads.

    Args:
        tables: cosine and sine for t, h and w, each ``[S, B, 1, 1, width / 2]``.
    """

    def heads(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        normalised = []
        for part, weight in zip(parts, weights, strict=True):
            exact = part.to(torch.promote_types(part.dtype, torch.float32))
            normalised.append(exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps) * weight)
        halves = []
        for axis, (cos, sin) in zip(_axes(normalised), tables, strict=True):
            first, second = axis.chunk(2, dim=-1)
            halves += [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(halves, dim=-1).to(projections[0].dtype).flatten(2, 3)

    query, key, value = _parts(projections)
    return heads(query, query_norms), heads(key, key_norms), value.flatten(2, 3)


def _parts(projections: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The parts of queries and keys with a norm each, ``[S, B, G, R, ...]`` with R = 1 for keys; and the values."""
    query, key, value = projections[0].split((projections[0].shape[-2] - 2, 1, 1), dim=-2)
    if len(projections) == 1:
        return query.chunk(2, dim=-1), key.chunk(2, dim=-1), value
    query_hw, key_hw = projections[1].split((query.shape[-2], 1), dim=-2)
    return (query, *query_hw.chunk(2, dim=-1)), (key, *key_hw.chunk(2, dim=-1)), value


def _axes(normalised: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The channels for t, h and w."""
    for_t, *others = normalised
    return (for_t, *others) if len(others) == 2 else (for_t, *others[0].chunk(2, dim=-1))
