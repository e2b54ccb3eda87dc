"""The attention rule as the blocks of FlexAttention, in time and memory linear in the tokens of a pack.

What a query sees is one interval of keys: from the start of its document to itself, or to the end of its image. Two
numbers per row therefore say everything: which blocks of keys some row of a block sees, which all of its rows see
in full, and which query sees which key in the blocks between. PyTorch's `create_block_mask` asks about every pair.

Nothing here reads a number from the device: a mask is built without synchronising with it.

Shape suffixes: B packs, T keys of a pack, Q query rows held by this rank, I blocks of rows, J blocks of keys.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from neo_megatron.model.mask import AttentionRule


@dataclass(frozen=True)
class SeenKeys:
    """The keys that each row of this rank sees, ``first`` to before ``end``: int32 ``[B, Q]`` each."""

    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, rule: AttentionRule) -> "SeenKeys":
        """From a rule whose documents and images are intervals of a pack, as those of the data set are."""
        document, image = rule.document_BT, rule.image_BT
        place = torch.arange(document.shape[1], dtype=torch.int32, device=document.device)
        document_start, _ = _runs(document, place)
        _, image_end = _runs(image, place)
        inside = document >= 0
        first = torch.where(inside, document_start, place)  # padding sees itself
        end = torch.where(inside & (image >= 0), image_end, place + 1)
        if rule.rows is not None:
            first, end = first.index_select(1, rule.rows), end.index_select(1, rule.rows)
        return cls(first.contiguous(), end.contiguous())

    def blocks(self, keys: int, block_size: tuple[int, int]) -> BlockMask:
        """The mask in blocks of ``block_size = (rows, keys)``; blocks that no row sees are in no list.

        Args:
            keys: T.
        """
        first, end = self.first, self.end
        packs, rows = first.shape
        row_blocks, key_blocks = (-(-count // size) for count, size in zip((rows, keys), block_size, strict=True))
        ragged = row_blocks * block_size[0] - rows
        # A row that sees nothing: the last block of rows is then never called fully seen, as in create_block_mask.
        first, end = (torch.nn.functional.pad(x, (0, ragged)).unflatten(1, (row_blocks, -1)) for x in (first, end))

        # +1 where an interval begins and -1 after it: the running sum counts the rows that see something of a block.
        counts = first.new_zeros(packs, row_blocks, key_blocks + 1)
        here = (end > first).to(counts.dtype)
        counts.scatter_add_(2, (first // block_size[1]).long(), here)
        counts.scatter_add_(2, (-(-end // block_size[1])).long(), -here)
        seen_BIJ = counts.cumsum(dim=2)[..., :-1] > 0

        start_J = torch.arange(key_blocks, dtype=torch.int32, device=first.device) * block_size[1]
        last_first, first_end = first.amax(dim=2, keepdim=True), end.amin(dim=2, keepdim=True)
        full_BIJ = (last_first <= start_J) & (start_J + block_size[1] <= first_end)

        row_first, row_end = self.first, self.end

        def mask_mod(pack, head, query, key):
            return (row_first[pack, query] <= key) & (key < row_end[pack, query])

        return BlockMask.from_kv_blocks(
            *_ordered(seen_BIJ & ~full_BIJ),
            *_ordered(full_BIJ),
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=(rows, keys),
        )

    @cached_property
    def pairs(self) -> Tensor:
        """Number of pairs of query and key that the rule allows, int64 scalar on the device."""
        return (self.end - self.first).sum(dtype=torch.int64)


def computed_pairs(mask: BlockMask) -> Tensor:
    """Number of pairs of query and key that FlexAttention computes per head, int64 scalar on the device."""
    blocks = mask.kv_num_blocks.sum(dtype=torch.int64) + mask.full_kv_num_blocks.sum(dtype=torch.int64)
    return blocks * (mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1])


def _runs(number_BT: Tensor, place_T: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (exclusive) of the run of equal numbers that each token is in; int32 ``[B, T]`` each."""
    length = number_BT.shape[1]
    changes = number_BT[:, 1:] != number_BT[:, :-1]
    begins = torch.nn.functional.pad(changes, (1, 0), value=True)
    ends = torch.nn.functional.pad(changes, (0, 1), value=True)
    start = torch.where(begins, place_T, 0).cummax(dim=1).values
    end = torch.where(ends, place_T + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return start, end


def _ordered(wanted_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """For every block of rows the number of wanted blocks of keys, and block numbers with the wanted ones first."""
    wanted = wanted_BIJ[:, None].to(torch.int32)
    return wanted.sum(dim=-1, dtype=torch.int32), wanted.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
