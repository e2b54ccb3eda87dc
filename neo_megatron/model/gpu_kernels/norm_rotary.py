"""Projections -> queries, keys and values on a GPU: norms, rotations and concatenation in one Triton kernel.

The forward reads the queries and keys of the projections and writes the heads; values stay where they are, as a view.
The backward reads projections and gradients of the heads, computes the norms again, and writes the gradient of each
projection, values included. So the graph keeps nothing but the projections, and every number moves once.

A program works on a tile of tokens and on one key-value head with its query heads, which lie next to each other in the
projections. It reads the tables of its tokens once for all of these heads; the programs of the other key-value heads,
which run at the same time, find them in the cache. The two channels of a rotation are the same place of two tiles, so
that they meet in one thread, and a thread reads and writes 16 bytes at a time, for h and w in the backward 8.

A program of the backward takes `TILES` tiles in turn and adds up the gradients of the norms in registers. It writes one
row of partial sums, and PyTorch adds the rows in a fixed order: no atomics, the same bytes in every run. At 8,192
tokens of NEO-2B there are 4,096 programs in the forward and 1,024 in the backward, of at most 2^31 that a GPU takes.

Values have rows of their own in the projection, of 256 bytes in NEO-2B: attention reads them there as fast as from a
copy. Megatron's layers are not compiled, and this is not traced by `torch.compile`.

Shape suffixes: S sequence, B packs, G key-value heads, R query heads per key-value head, X channels of queries and
keys, D of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WARPS = 2
# Numbers of a tile: tokens x half of the channels for t. Of 1,024 each of 64 threads has 16, two times 16 bytes in
# bfloat16, and of a tile for h or w half as many. Threads of the backward hold also gradients and sums.
FORWARD_TILE, BACKWARD_TILE = 1024, 512
# Tiles of a program of the backward: more of them mean less traffic for partial sums, and fewer programs.
TILES = 8

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _inside(token, tokens, column, F: tl.constexpr):
    """The mask of a tile: the last one has tokens that do not exist, and F may not be a power of two."""
    mask = (token < tokens)[:, None]
    if triton.next_power_of_2(F) != F:
        mask = mask & (column < F)[None, :]
    return mask


@triton.jit
def _pair(rows, column, mask, F: tl.constexpr, EXACT: tl.constexpr):
    """Both halves of the channels of an axis, F each."""
    places = rows[:, None] + column[None, :]
    first = tl.load(places, mask=mask, other=0.0).to(EXACT)
    return first, tl.load(places + F, mask=mask, other=0.0).to(EXACT)


@triton.jit
def _put_pair(rows, column, mask, pair, F: tl.constexpr):
    places = rows[:, None] + column[None, :]
    tl.store(places, pair[0].to(rows.dtype.element_ty), mask=mask)
    tl.store(places + F, pair[1].to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _table(cos, sin, token, column, mask, F: tl.constexpr, EXACT: tl.constexpr):
    places = token[:, None] * F + column[None, :]
    cos = tl.load(cos + places, mask=mask, other=0.0).to(EXACT)
    return cos, tl.load(sin + places, mask=mask, other=0.0).to(EXACT)


@triton.jit
def _norm(weight, column, F: tl.constexpr, EXACT: tl.constexpr):
    """Both halves of the weight of a norm, as rows."""
    inside = column < F
    first = tl.load(weight + column, mask=inside, other=0.0).to(EXACT)[None, :]
    return first, tl.load(weight + F + column, mask=inside, other=0.0).to(EXACT)[None, :]


@triton.jit
def _times(pair, other):
    return pair[0] * other[0], pair[1] * other[1]


@triton.jit
def _rotated(pair, table):
    return pair[0] * table[0] - pair[1] * table[1], pair[1] * table[0] + pair[0] * table[1]


@triton.jit
def _rotated_back(pair, table):
    return pair[0] * table[0] + pair[1] * table[1], pair[1] * table[0] - pair[0] * table[1]


@triton.jit
def _row_sum(pair, other):
    """The scalar product over the channels of each row, ``[rows, 1]``."""
    return tl.sum(pair[0] * other[0] + pair[1] * other[1], axis=1)[:, None]


@triton.jit
def _scaled(pair, scale):
    return pair[0] * scale, pair[1] * scale


@triton.jit
def _less(pair, other, factor):
    return pair[0] - other[0] * factor, pair[1] - other[1] * factor


@triton.jit
def _plus(pair, other):
    return pair[0] + other[0], pair[1] + other[1]


@triton.jit
def _put_sums(row, column, sums, F: tl.constexpr):
    """Stores what the tokens of a program sum up to."""
    tl.store(row + column, tl.sum(sums[0], axis=0), mask=column < F)
    tl.store(row + F + column, tl.sum(sums[1], axis=0), mask=column < F)


@triton.jit
def _normalised_t(source, column, mask, eps, F: tl.constexpr, EXACT: tl.constexpr):
    """The channels for t before the weight, and their factor of each row."""
    t = _pair(source, column, mask, F, EXACT)
    scale = tl.rsqrt(_row_sum(t, t) / (2 * F) + eps)
    return _scaled(t, scale), scale


@triton.jit
def _normalised_hw(source, column, mask, eps, F: tl.constexpr, JOINT: tl.constexpr, EXACT: tl.constexpr):
    """The channels for h and for w before the weights, and their factors."""
    h = _pair(source, column, mask, F, EXACT)
    w = _pair(source + 2 * F, column, mask, F, EXACT)
    square_h, square_w = _row_sum(h, h), _row_sum(w, w)
    if JOINT:
        scale_h = tl.rsqrt((square_h + square_w) / (4 * F) + eps)
        scale_w = scale_h
    else:
        scale_h = tl.rsqrt(square_h / (2 * F) + eps)
        scale_w = tl.rsqrt(square_w / (2 * F) + eps)
    return _scaled(h, scale_h), _scaled(w, scale_w), scale_h, scale_w


@triton.jit
def _forward_t(source, out, norm, table, column, mask, eps, F: tl.constexpr, EXACT: tl.constexpr):
    t, _ = _normalised_t(source, column, mask, eps, F, EXACT)
    _put_pair(out, column, mask, _rotated(_times(t, norm), table), F)


@triton.jit
def _forward_hw(
    source, out, norms, tables, column, mask, eps, F: tl.constexpr, JOINT: tl.constexpr, EXACT: tl.constexpr
):
    h, w, _, _ = _normalised_hw(source, column, mask, eps, F, JOINT, EXACT)
    _put_pair(out, column, mask, _rotated(_times(h, norms[0]), tables[0]), F)
    _put_pair(out + 2 * F, column, mask, _rotated(_times(w, norms[1]), tables[1]), F)


@triton.jit
def norm_rotary_forward(
    projection_t,
    projection_hw,
    query,
    key,
    query_norm_t,
    query_norm_h,
    query_norm_w,
    key_norm_t,
    key_norm_h,
    key_norm_w,
    cos_t,
    sin_t,
    cos_h,
    sin_h,
    cos_w,
    sin_w,
    tokens,
    eps,
    G: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Queries ``[tokens, G, R, X]`` and keys ``[tokens, G, X]``; a program has `ROWS` tokens and one key-value head."""
    JOINT: tl.constexpr = X == D
    token = (tl.program_id(0) // G * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = token * G + tl.program_id(0) % G
    queries, keys = query + head * R * X, key + head * X

    T: tl.constexpr = X // 4
    column = tl.arange(0, triton.next_power_of_2(T))
    mask = _inside(token, tokens, column, T)
    source = projection_t + head * (R + 2) * D
    table = _table(cos_t, sin_t, token, column, mask, T, EXACT)
    norm = _norm(query_norm_t, column, T, EXACT)
    for r in range(R):
        _forward_t(source + r * D, queries + r * X, norm, table, column, mask, eps, T, EXACT)
    _forward_t(source + R * D, keys, _norm(key_norm_t, column, T, EXACT), table, column, mask, eps, T, EXACT)

    HW: tl.constexpr = X // 8
    column = tl.arange(0, triton.next_power_of_2(HW))
    mask = _inside(token, tokens, column, HW)
    source = projection_hw + (head * (R + 2) * D + D // 2 if JOINT else head * (R + 1) * D)
    tables = (
        _table(cos_h, sin_h, token, column, mask, HW, EXACT),
        _table(cos_w, sin_w, token, column, mask, HW, EXACT),
    )
    norms = _norm(query_norm_h, column, HW, EXACT), _norm(query_norm_w, column, HW, EXACT)
    for r in range(R):
        out = queries + r * X + X // 2
        _forward_hw(source + r * D, out, norms, tables, column, mask, eps, HW, JOINT, EXACT)
    norms = _norm(key_norm_h, column, HW, EXACT), _norm(key_norm_w, column, HW, EXACT)
    _forward_hw(source + R * D, keys + X // 2, norms, tables, column, mask, eps, HW, JOINT, EXACT)


@triton.jit
def _backward_t(
    source, d_out, d_source, norm, table, sums, column, mask, eps,
    F: tl.constexpr, EXACT: tl.constexpr, WRITES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the channels for t; returns the sums and the gradient of the weight in each row."""
    t, scale = _normalised_t(source, column, mask, eps, F, EXACT)
    d_scaled = _rotated_back(_pair(d_out, column, mask, F, EXACT), table)
    if WRITES:
        d_t = _times(d_scaled, norm)
        _put_pair(d_source, column, mask, _scaled(_less(d_t, t, _row_sum(d_t, t) / (2 * F)), scale), F)
    if SUMS:
        sums = _plus(sums, _times(d_scaled, t))
    return sums


@triton.jit
def _backward_hw(
    source, d_out, d_source, norms, tables, sums, column, mask, eps,
    F: tl.constexpr, JOINT: tl.constexpr, EXACT: tl.constexpr, WRITES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    h, w, scale_h, scale_w = _normalised_hw(source, column, mask, eps, F, JOINT, EXACT)
    d_scaled_h = _rotated_back(_pair(d_out, column, mask, F, EXACT), tables[0])
    d_scaled_w = _rotated_back(_pair(d_out + 2 * F, column, mask, F, EXACT), tables[1])
    if WRITES:
        d_h, d_w = _times(d_scaled_h, norms[0]), _times(d_scaled_w, norms[1])
        along_h, along_w = _row_sum(d_h, h) / (2 * F), _row_sum(d_w, w) / (2 * F)
        if JOINT:
            along_h = (along_h + along_w) / 2
            along_w = along_h
        _put_pair(d_source, column, mask, _scaled(_less(d_h, h, along_h), scale_h), F)
        _put_pair(d_source + 2 * F, column, mask, _scaled(_less(d_w, w, along_w), scale_w), F)
    if SUMS:
        sums = _plus(sums[0], _times(d_scaled_h, h)), _plus(sums[1], _times(d_scaled_w, w))
    return sums


@triton.jit
def norm_rotary_backward(
    projection_t,
    projection_hw,
    d_query,
    d_key,
    d_value,
    d_projection_t,
    d_projection_hw,
    partial_sums,
    query_norm_t,
    query_norm_h,
    query_norm_w,
    key_norm_t,
    key_norm_h,
    key_norm_w,
    cos_t,
    sin_t,
    cos_h,
    sin_h,
    cos_w,
    sin_w,
    tokens,
    eps,
    d_query_token,
    d_query_head,
    d_key_token,
    d_key_head,
    d_value_token,
    d_value_head,
    G: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    EXACT: tl.constexpr,
    WRITES_T: tl.constexpr,
    WRITES_HW: tl.constexpr,
    SUMS_T: tl.constexpr,
    SUMS_HW: tl.constexpr,
):
    """Gradients of the projections, and partial sums ``[programs, 2, columns]`` of those of query and key norms.

    Args:
        d_query_token, d_query_head: strides of `d_query` between tokens and between heads; likewise the others.
        WRITES_T, WRITES_HW: whether the projection requires a gradient; that of values belongs to the one for t.
        SUMS_T, SUMS_HW: whether the norms for t, and those for h and w, require gradients. Others have no columns.
    """
    JOINT: tl.constexpr = X == D
    group = (tl.program_id(0) % G).to(tl.int64)
    first = tl.program_id(0) // G * (TILES * ROWS)
    SUMS: tl.constexpr = (X // 2 if SUMS_T else 0) + (X // 2 if SUMS_HW else 0)
    query_sums = partial_sums + tl.program_id(0).to(tl.int64) * (2 * SUMS)

    T: tl.constexpr = X // 4
    if WRITES_T or SUMS_T:
        column = tl.arange(0, triton.next_power_of_2(T))
        query_norm, key_norm = _norm(query_norm_t, column, T, EXACT), _norm(key_norm_t, column, T, EXACT)
        zero = tl.zeros((ROWS, triton.next_power_of_2(T)), EXACT)
        query_sum, key_sum = (zero, zero), (zero, zero)
        for tile in range(TILES):
            token = (first + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            mask = _inside(token, tokens, column, T)
            table = _table(cos_t, sin_t, token, column, mask, T, EXACT)
            place = (token * G + group) * (R + 2) * D
            source, d_source = projection_t + place, d_projection_t + place
            for r in range(R):
                d_out = d_query + token * d_query_token + (group * R + r) * d_query_head
                query_sum = _backward_t(
                    source + r * D, d_out, d_source + r * D, query_norm, table, query_sum, column, mask, eps,
                    T, EXACT, WRITES_T, SUMS_T,
                )  # fmt: skip
            d_out = d_key + token * d_key_token + group * d_key_head
            key_sum = _backward_t(
                source + R * D, d_out, d_source + R * D, key_norm, table, key_sum, column, mask, eps,
                T, EXACT, WRITES_T, SUMS_T,
            )  # fmt: skip
            if WRITES_T:
                channel = tl.arange(0, triton.next_power_of_2(D))
                inside = _inside(token, tokens, channel, D)
                d_v = d_value + token * d_value_token + group * d_value_head
                d_v = tl.load(d_v[:, None] + channel[None, :], mask=inside)
                tl.store((d_source + (R + 1) * D)[:, None] + channel[None, :], d_v, mask=inside)
        if SUMS_T:
            _put_sums(query_sums, column, query_sum, T)
            _put_sums(query_sums + SUMS, column, key_sum, T)
            query_sums += X // 2

    HW: tl.constexpr = X // 8
    if WRITES_HW or SUMS_HW:
        column = tl.arange(0, triton.next_power_of_2(HW))
        query_norms = _norm(query_norm_h, column, HW, EXACT), _norm(query_norm_w, column, HW, EXACT)
        key_norms = _norm(key_norm_h, column, HW, EXACT), _norm(key_norm_w, column, HW, EXACT)
        zero = tl.zeros((ROWS, triton.next_power_of_2(HW)), EXACT)
        query_sum, key_sum = ((zero, zero), (zero, zero)), ((zero, zero), (zero, zero))
        for tile in range(TILES):
            token = (first + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            mask = _inside(token, tokens, column, HW)
            tables = (
                _table(cos_h, sin_h, token, column, mask, HW, EXACT),
                _table(cos_w, sin_w, token, column, mask, HW, EXACT),
            )
            place = token * G + group
            place = place * (R + 2) * D + D // 2 if JOINT else place * (R + 1) * D
            source, d_source = projection_hw + place, d_projection_hw + place
            for r in range(R):
                d_out = d_query + token * d_query_token + (group * R + r) * d_query_head + X // 2
                query_sum = _backward_hw(
                    source + r * D, d_out, d_source + r * D, query_norms, tables, query_sum, column, mask, eps,
                    HW, JOINT, EXACT, WRITES_HW, SUMS_HW,
                )  # fmt: skip
            d_out = d_key + token * d_key_token + group * d_key_head + X // 2
            key_sum = _backward_hw(
                source + R * D, d_out, d_source + R * D, key_norms, tables, key_sum, column, mask, eps,
                HW, JOINT, EXACT, WRITES_HW, SUMS_HW,
            )  # fmt: skip
        if SUMS_HW:
            _put_sums(query_sums, column, query_sum[0], HW)
            _put_sums(query_sums + 2 * HW, column, query_sum[1], HW)
            _put_sums(query_sums + SUMS, column, key_sum[0], HW)
            _put_sums(query_sums + SUMS + 2 * HW, column, key_sum[1], HW)


@dataclass(frozen=True)
class _Layer:
    """The tensors of a layer and the constants that kernels are compiled for."""

    projections: Sequence[Tensor]
    query_norms: Sequence[Tensor]
    key_norms: Sequence[Tensor]
    tables: Sequence[Tensor]
    eps: float

    @property
    def exact(self) -> torch.dtype:
        return torch.promote_types(self.projections[0].dtype, torch.float32)

    @property
    def constants(self) -> dict[str, Any]:
        groups, parts, width = self.projections[0].shape[2:]
        exact = tl.float64 if self.exact == torch.float64 else tl.float32
        return {"G": groups, "R": parts - 2, "X": width * len(self.projections), "D": width, "EXACT": exact}

    @property
    def tokens(self) -> int:
        return self.projections[0].shape[0] * self.projections[0].shape[1]

    def new_heads(self) -> tuple[Tensor, Tensor]:
        """Memory for queries and keys."""
        first, sizes = self.projections[0], self.constants
        shape = (*first.shape[:2], sizes["G"] * sizes["R"], sizes["X"])
        return first.new_empty(shape), first.new_empty(*shape[:2], sizes["G"], sizes["X"])

    def rows(self, tile: int) -> int:
        """Tokens of a tile of so many numbers."""
        return max(1, tile // triton.next_power_of_2(self.constants["X"] // 4))

    def programs(self, tokens: int) -> int:
        """Programs that work on so many tokens each."""
        return triton.cdiv(self.tokens, tokens) * self.constants["G"]

    def weights(self) -> list[Tensor]:
        """Weights for t, h and w of queries, then of keys; views of them where one is for h and w."""
        weights: list[Tensor] = []
        for for_t, *others in (self.query_norms, self.key_norms):
            weights += (for_t, *(others if len(others) == 2 else others[0].chunk(2)))
        return weights


@dataclass(frozen=True)
class _Gradients:
    """Memory for what the backward computes.

    Args:
        projections: None where no gradient is required.
        partial_sums: ``[programs, 2, channels of the norms that require gradients]``: queries and keys.
        summed: whether norms require gradients: that for t, then that or those for h and w.
    """

    projections: Sequence[Tensor | None]
    partial_sums: Tensor
    summed: Sequence[bool]


def launch_forward(layer: _Layer, query: Tensor, key: Tensor) -> None:
    """Writes the heads."""
    rows = layer.rows(FORWARD_TILE)
    norm_rotary_forward[(layer.programs(rows),)](
        layer.projections[0],
        layer.projections[-1],
        query,
        key,
        *layer.weights(),
        *layer.tables,
        layer.tokens,
        layer.eps,
        **layer.constants,
        ROWS=rows,
        num_warps=WARPS,
    )


def launch_backward(layer: _Layer, d_heads: Sequence[Tensor], gradients: _Gradients) -> None:
    """Writes `gradients`.

    Args:
        d_heads: of queries, keys and values, each ``[S * B, heads, channels]`` with neighbouring channels.
    """
    # Without a gradient its place is taken by the projection itself, which the kernel does not write to.
    d_projections = [
        projection if gradient is None else gradient
        for projection, gradient in zip(layer.projections, gradients.projections, strict=True)
    ]
    norm_rotary_backward[(len(gradients.partial_sums),)](
        layer.projections[0],
        layer.projections[-1],
        *d_heads,
        d_projections[0],
        d_projections[-1],
        gradients.partial_sums,
        *layer.weights(),
        *layer.tables,
        layer.tokens,
        layer.eps,
        *(stride for d_head in d_heads for stride in d_head.stride()[:2]),
        **layer.constants,
        ROWS=layer.rows(BACKWARD_TILE),
        TILES=TILES,
        WRITES_T=gradients.projections[0] is not None,
        WRITES_HW=gradients.projections[-1] is not None,
        SUMS_T=gradients.summed[0],
        SUMS_HW=gradients.summed[-1],
        num_warps=WARPS,
    )


def _parts(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Items of projections, of query norms and of key norms: 2 + 3 + 3 in the form ``separate``, 1 + 2 + 2 in-head."""
    count = len(items) // 4
    return items[:count], items[count : -count - 1], items[-count - 1 :]


class NormRotary(torch.autograd.Function):
    """``apply(tables, eps, *projections, *query_norms, *key_norms)``: `qkv_prepare.at_once`, on tensors of one GPU.

    Values are a view of the first projection. A gradient is computed where it is required: of a projection, of the
    norms for t, and of all norms for h and w.
    """

    @staticmethod
    def forward(ctx: Any, tables: Sequence[tuple[Tensor, Tensor]], eps: float, *tensors: Tensor) -> QueryKeyValue:
        ctx.tables, ctx.eps = [table.contiguous() for pair in tables for table in pair], eps
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        ctx.save_for_backward(*tensors)
        layer = _Layer(*_parts(tensors), ctx.tables, eps)
        query, key = layer.new_heads()
        launch_forward(layer, query, key)
        value = layer.projections[0].detach()[..., -1, :]
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(value)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_heads: Tensor) -> tuple[Tensor | None, ...]:
        layer = _Layer(*_parts(ctx.saved_tensors), ctx.tables, ctx.eps)
        wanted = ctx.needs_input_grad[2:]
        wants_projections, *wants_norms = _parts(wanted)
        d_projections = [
            torch.empty_like(projection) if wants else None
            for projection, wants in zip(layer.projections, wants_projections, strict=True)
        ]
        wants_t, *wants_hw = (any(pair) for pair in zip(*wants_norms, strict=True))
        summed = [wants_t, *[any(wants_hw)] * len(wants_hw)]
        widths = [len(norm) if sums else 0 for norm, sums in zip(layer.query_norms, summed, strict=True)]
        programs = layer.programs(layer.rows(BACKWARD_TILE) * TILES)
        partial_sums = layer.projections[0].new_empty((programs, 2, sum(widths)), dtype=layer.exact)
        gradients = _Gradients(d_projections, partial_sums, summed)
        launch_backward(layer, [_rows(d_head) for d_head in d_heads], gradients)
        # Weights of a layer have one dtype: all of their gradients are rounded in one go.
        sums = partial_sums.sum(dim=0).to(layer.query_norms[0].dtype)
        d_norms = [part for of_heads in sums for part in of_heads.split(widths)]
        return (
            None,
            None,
            *(gradient if wants else None for gradient, wants in zip((*d_projections, *d_norms), wanted, strict=True)),
        )


def _rows(d_head: Tensor) -> Tensor:
    """``[S * B, heads, channels]`` with neighbouring channels; a copy only of what has no strides for this."""
    rows = d_head.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
