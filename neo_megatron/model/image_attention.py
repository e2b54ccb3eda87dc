"""The share of attention that trained positions give to image tokens, measured in an evaluation.

Kernels do not return weights, so those of the measured rows are computed again: an exact softmax in float32, in blocks
of rows.

Shape suffixes: B packs, T tokens of a pack, Q query rows that the attention of this rank sees, N query heads and G
key-value heads of this rank, X channels of queries and keys, M measured rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neo_megatron.model.mask import AttentionRule

# Numbers of a block of scores: 64 MB in float32, of which there are a few copies.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class MeasuredRows:
    """The rows of a micro-batch that are measured.

    Args:
        rule: of the micro-batch.
        rows_M: int64 ``[M]``, rows of the flattened queries ``[Q * B]``; all see image tokens of their samples.
    """

    rule: AttentionRule
    rows_M: Tensor

    def share_of_images(self, query_QBNX: Tensor, key_TBGX: Tensor, scale: float) -> Tensor:
        """Sum over rows and heads of the weights of image tokens, and the number of rows times heads: float64 ``[2]``.

        Args:
            query_QBNX, key_TBGX, scale: as the core attention takes them.
        """
        packs, heads, keys = query_QBNX.shape[1], query_QBNX.shape[2], len(key_TBGX)
        total = torch.zeros((), dtype=torch.float64, device=query_QBNX.device)
        for pack in range(packs):
            of_pack = self.rows_M[self.rows_M % packs == pack] // packs
            for rows in of_pack.split(max(1, _BLOCK // (heads * keys))):
                weights = self._weights(query_QBNX[rows, pack], key_TBGX[:, pack], pack, rows, scale)
                total += weights[..., self.rule.image_BT[pack] >= 0].sum(dtype=torch.float64)
        return torch.stack((total, torch.full_like(total, len(self.rows_M) * heads)))

    def _weights(self, query_MNX: Tensor, key_TGX: Tensor, pack: int, rows_M: Tensor, scale: float) -> Tensor:
        """``[G, N / G, M, T]``."""
        exact = torch.promote_types(query_MNX.dtype, torch.float32)
        query = query_MNX.to(exact).unflatten(1, (key_TGX.shape[1], -1)).permute(1, 2, 0, 3)
        scores = query @ key_TGX.to(exact).permute(1, 2, 0)[:, None] * scale
        places = rows_M if self.rule.rows is None else self.rule.rows[rows_M]
        keys = torch.arange(len(key_TGX), device=scores.device)
        return scores.masked_fill(~self.rule.allows(pack, places[:, None], keys), float("-inf")).softmax(dim=-1)
