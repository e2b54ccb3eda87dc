"""Attention on a CPU, computed where the mask allows it: query rows in tiles, each with the keys that it can see.

What a query sees is one interval of keys, from the start of its document to itself or to the end of its image. So a
tile of neighbouring rows of one document needs the keys from the document's start to the last that any of them sees,
and a mask only for those that not all of them see. Nothing is computed between documents, for padding, or above the
diagonal beyond a tile, where PyTorch's kernel for masks computes everything; and values may be narrower than keys.

The backward computes the weights again, tile by tile: the graph keeps queries, keys, values and two numbers per row.

Shape suffixes: Q query rows, T keys of a pack, B packs, N query heads, G key-value heads, R query heads per key-value
head, D head dimension, M rows of all R heads of a tile, K keys of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.mask import AttentionRule

# Larger tiles compute more that the mask forbids, smaller ones make slower matrix products.
TILE_ROWS = 128


@dataclass(frozen=True)
class Tile:
    """Neighbouring query rows of one document, and the keys that some of them see.

    Args:
        pack: number of the pack.
        rows: of the queries that this rank holds.
        keys: of the pack.
        bias: ``[rows, last keys]`` to add to the scores of the last keys, 0 or -inf; all rows see the keys before.
    """

    pack: int
    rows: slice
    keys: slice
    bias: Tensor

    def queries(self, x_QBNX: Tensor, groups: int) -> Tensor:
        """This tile's rows of a tensor with query heads -> ``[G, M, X]``, a copy."""
        rows = x_QBNX[self.rows, self.pack]
        return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)

    def put_queries(self, out_QBNX: Tensor, x_GMX: Tensor) -> None:
        """The reverse of `queries`."""
        rows = out_QBNX[self.rows, self.pack]
        rows.unflatten(1, (len(x_GMX), -1)).copy_(x_GMX.unflatten(1, (-1, len(rows))).permute(2, 0, 1, 3))

    def keys_of(self, x_TBGX: Tensor) -> Tensor:
        """This tile's keys or values ``[G, K, X]``, a view."""
        return x_TBGX[self.keys, self.pack].transpose(0, 1)

    def mask(self, score_GMK: Tensor) -> None:
        """Adds -inf to the scores of keys that a row does not see, in place."""
        rows, last = self.bias.shape
        if last:
            score_GMK.unflatten(1, (-1, rows))[..., -last:].add_(self.bias)

    @property
    def pairs(self) -> tuple[int, int]:
        """Pairs of query and key that are computed, and those of them that the rule allows."""
        computed = (self.rows.stop - self.rows.start) * (self.keys.stop - self.keys.start)
        return computed, computed - int(self.bias.count_nonzero())


@dataclass(frozen=True)
class TiledMask:
    """The tiles of a micro-batch; and the padding, which sees itself: rows and keys, each with its pack."""

    tiles: list[Tile]
    padding_rows: tuple[Tensor, Tensor]
    padding_keys: tuple[Tensor, Tensor]

    @classmethod
    def from_rule(cls, rule: AttentionRule, dtype: torch.dtype) -> "TiledMask":
        """The tiles of documents and images that are intervals of a pack, as those of the data set are."""
        packs, length = rule.document_BT.shape
        rows = torch.arange(length) if rule.rows is None else rule.rows
        seen_keys = SeenKeys.of(rule)
        tiles = []
        for pack in range(packs):
            document, end = rule.document_BT[pack], seen_keys.end[pack]
            changes = (torch.nonzero(document[rows].diff()).flatten() + 1).tolist()
            for first, last in zip([0, *changes], [*changes, len(rows)], strict=True):
                if document[rows[first]] < 0:
                    continue
                for top in range(first, last, TILE_ROWS):
                    here = slice(top, min(top + TILE_ROWS, last))
                    seen_by_all, seen = int(end[here].min()), int(end[here].max())
                    hidden = torch.arange(seen_by_all, seen) >= end[here, None]
                    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
                    tiles.append(Tile(pack, here, slice(int(seen_keys.first[pack, first]), seen), bias))
        padding_pack, padding_row = torch.nonzero(rule.document_BT[:, rows] < 0, as_tuple=True)
        return cls(tiles, (padding_row, padding_pack), (rows[padding_row], padding_pack))

    @property
    def pairs(self) -> tuple[int, int]:
        """Pairs of all tiles, plus one for each padding token, whose value is copied."""
        padding = len(self.padding_rows[0])
        computed, allowed = (sum(counts) for counts in zip(*(tile.pairs for tile in self.tiles), (0, 0), strict=True))
        return computed + padding, allowed + padding


class TiledAttention(torch.autograd.Function):
    """Softmax attention with grouped queries in float32, or in float64 where the arguments are.

    ``apply(query [Q, B, N, X], key [T, B, G, X], value [T, B, G, D], mask, scale)`` -> ``[Q, B, N, D]``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: TiledMask, scale: float) -> Tensor:
        ctx.dtype = value.dtype
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
        groups = key.shape[2]
        out = value.new_empty(*query.shape[:3], value.shape[3])
        # Logarithm of the sum of the exponentiated scores, by which the backward makes the weights again.
        normaliser = value.new_zeros(*query.shape[:3], 1)
        for tile in mask.tiles:
            score = _scaled(tile.queries(query, groups), tile.keys_of(key).mT, scale)
            tile.mask(score)
            highest = score.amax(dim=-1, keepdim=True)
            weight = score.sub_(highest).exp_()
            total = weight.sum(dim=-1, keepdim=True)
            tile.put_queries(out, torch.bmm(weight, tile.keys_of(value)).div_(total))
            tile.put_queries(normaliser, total.log_().add_(highest))
        out[mask.padding_rows] = value[mask.padding_keys].repeat_interleave(query.shape[2] // groups, dim=1)
        ctx.save_for_backward(query, key, value, out, normaliser)
        ctx.mask, ctx.scale = mask, scale
        return out.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser = ctx.saved_tensors
        mask, scale, groups = ctx.mask, ctx.scale, key.shape[2]
        d_out = d_out.to(out.dtype)
        # The gradient of a softmax: d_score = weight * (d_weight - sum of weight * d_weight), the sum as in
        # FlashAttention (arXiv 2205.14135): out * d_out.
        shift = (d_out * out).sum(dim=-1, keepdim=True)
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for tile in mask.tiles:
            q, d_o, k, v = (
                tile.queries(query, groups),
                tile.queries(d_out, groups),
                tile.keys_of(key),
                tile.keys_of(value),
            )
            score = torch.baddbmm(tile.queries(normaliser, groups), q, k.mT, beta=-1, alpha=scale)
            tile.mask(score)
            weight = score.exp_()
            tile.keys_of(d_value).add_(torch.bmm(weight.mT, d_o))
            d_score = torch.baddbmm(tile.queries(shift, groups), d_o, v.mT, beta=-1).mul_(weight)
            tile.put_queries(d_query, _scaled(d_score, k, scale))
            tile.keys_of(d_key).add_(_scaled(d_score.mT, q, scale))
        from_padding = d_out[mask.padding_rows].unflatten(1, (groups, -1)).sum(dim=2)
        d_value.index_put_(mask.padding_keys, from_padding, accumulate=True)
        return d_query.to(ctx.dtype), d_key.to(ctx.dtype), d_value.to(ctx.dtype), None, None


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left @ right`` for stacks of matrices, in one pass."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
