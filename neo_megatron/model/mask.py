"""The attention mask of a packed sequence: causal within each document, bidirectional within each image.

The rule is written once, as two integers per token, and every kernel derives its mask from them:

    document_BT  number of the token's document in its pack; -1 marks padding
    image_BT     number of the token's image in its pack;    -1 for every token that is not an image token

Shape suffixes: B packs of a micro-batch, T tokens of one pack, Q query rows held by this rank, K key columns.
Source of the rule: NEO (arXiv 2510.14979), section 3.2; `tests/model/test_mask.py` holds it against published masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class AttentionRule:
    """Per-token facts that decide attention, for the keys of complete packs and the query rows of one rank.

    Args:
        document_BT: int32 ``[B, T]``, non-decreasing over a pack; -1 for padding.
        image_BT: int32 ``[B, T]``, distinct per image of a pack; -1 outside images.
        rows: int64 ``[Q]``, positions of this rank's queries in the packs; ``None`` when it holds all of them.
    """

    document_BT: Tensor
    image_BT: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.document_BT.shape != self.image_BT.shape or self.document_BT.dim() != 2:
            raise ValueError(
                f"document_BT and image_BT must be 2-D and of one shape, got {tuple(self.document_BT.shape)} "
                f"and {tuple(self.image_BT.shape)}"
            )

    def allows(self, pack: Tensor | int, query: Tensor, key: Tensor) -> Tensor:
        """Whether token ``query`` of ``pack`` may see token ``key``; broadcasts over index tensors.

        Padding sees itself alone: a row without any key would turn softmax into NaN.
        """
        document_Q, document_K = self.document_BT[pack, query], self.document_BT[pack, key]
        image_Q, image_K = self.image_BT[pack, query], self.image_BT[pack, key]
        same_document = (document_Q == document_K) & (document_Q >= 0)
        same_image = (image_Q == image_K) & (image_Q >= 0)
        return (same_document & ((key <= query) | same_image)) | (query == key)

    def dense(self) -> Tensor:
        """Boolean ``[B, Q, K]`` for SDPA and for tests. Memory grows with the square of T: not for long packs."""
        packs, length = self.document_BT.shape
        keys = torch.arange(length, device=self.document_BT.device)
        rows = keys if self.rows is None else self.rows
        pack = torch.arange(packs, device=self.document_BT.device)
        return self.allows(pack[:, None, None], rows[None, :, None], keys[None, None, :])

    def blocks(self, block_size: tuple[int, int]) -> BlockMask:
        """The same rule for FlexAttention, without ever holding ``[B, Q, K]`` on a GPU (compiled there).

        Build it once per micro-batch and share it between layers: it depends on the packs alone.
        """
        packs, length = self.document_BT.shape

        def mask_mod(pack, head, query, key):
            return self.allows(pack, query if self.rows is None else self.rows[query], key)

        return create_block_mask(
            mask_mod,
            B=packs,
            H=None,
            Q_LEN=length if self.rows is None else len(self.rows),
            KV_LEN=length,
            device=self.document_BT.device,
            BLOCK_SIZE=block_size,
            _compile=self.document_BT.is_cuda,
        )
