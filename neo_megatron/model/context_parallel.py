"""Context parallelism under NEO's mask: a rank holds S of the T tokens of each pack, attention sees all of them.

No kernel library has this mask (bidirectional inside an image, packed documents). There are two ways, and both need
only a mask from the kernel:

    a2a        tokens are exchanged for heads and back: in between a rank sees complete packs for its share of heads;
    allgather  keys and values are gathered: a rank sees complete packs, for the queries of its own rows only.

`cp_token_split.py` decides which rows a rank holds; `context_parallel_cost.py` has the costs and chooses the way.

Shape suffixes: S tokens of a pack held by this rank, T tokens of the complete pack, B packs, N query heads and G
key-value heads of this tensor-parallel rank, X channels of queries and keys, D of values.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

CoreAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def context_parallel_attention(
    core: CoreAttention,
    query_SBNX: Tensor,
    key_SBGX: Tensor,
    value_SBGD: Tensor,
    group: ProcessGroup,
    key_order_T: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's tokens to complete packs -> ``[S, B, N * D]``.

    Args:
        core: attention on one rank; its mask is for all rows (a2a) or for this rank's rows (allgather), for all keys.
        group: the context-parallel ranks; with one of them this is `core`.
        key_order_T: int64 ``[T]``, position of each token of a pack among the gathered ones; ``None`` for a2a, which
            requires rank r to hold the tokens ``r * S`` to ``(r + 1) * S`` and N and G to be multiples of the ranks.
    """
    if group.size() == 1:
        return core(query_SBNX, key_SBGX, value_SBGD)
    if key_order_T is None:
        return _with_exchanged_heads(core, query_SBNX, key_SBGX, value_SBGD, group)
    return _with_gathered_keys(core, query_SBNX, key_SBGX, value_SBGD, group, key_order_T)


def _with_exchanged_heads(
    core: CoreAttention, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
) -> Tensor:
    """Neighbouring key-value heads go to one rank, together with the query heads that belong to them."""
    ranks = group.size()
    # [S, B, heads, width] -> [ranks, S, B, heads / ranks * width]; one exchange carries all three.
    parts = [x.unflatten(2, (ranks, -1)).flatten(3).permute(2, 0, 1, 3) for x in (query, key, value)]
    exchanged = all_to_all(group, torch.cat(parts, dim=-1)).flatten(0, 1)
    widths = [part.shape[-1] for part in parts]
    complete = [
        x.unflatten(-1, (-1, before.shape[-1]))
        for x, before in zip(exchanged.split(widths, dim=-1), (query, key, value), strict=True)
    ]
    back = all_to_all(group, core(*complete).unflatten(0, (ranks, -1)))
    return back.permute(1, 2, 0, 3).flatten(2)


def _with_gathered_keys(
    core: CoreAttention, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup, key_order: Tensor
) -> Tensor:
    """The gathered keys and values do not outlive the forward: what the kernel saves of them is gathered again.

    Kept, they would be `ranks` times a rank's own, in every layer: at 131,072 tokens of NEO-9B 0.8 GB a layer.
    """
    packs = GatheredPacks(group, key_order)
    key_value = _Gather.apply(torch.cat((key, value), dim=-1), packs)
    key, value = key_value.split((key.shape[-1], value.shape[-1]), dim=-1)
    with saved_tensors_hooks(packs.forget, packs.recall):
        return core(query, key, value)


class GatheredPacks:
    """Gathers keys and values of complete packs from all ranks, in the forward and again in the backward."""

    def __init__(self, group: ProcessGroup, key_order: Tensor) -> None:
        self.group = group
        self.key_order = key_order
        self.part: Tensor | None = None
        self.gathered: Tensor | None = None
        self._storage = 0

    def gather(self, part_SBGW: Tensor) -> Tensor:
        """``[S, B, G, W]`` -> ``[T, B, G, W]`` in the order of the packs."""
        ranks = self.group.size()
        gathered = part_SBGW.new_empty((ranks * part_SBGW.shape[0], *part_SBGW.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, part_SBGW, group=self.group)
        return gathered.index_select(0, self.key_order)

    def start(self, part: Tensor) -> Tensor:
        self.part = part
        gathered = self.gather(part)
        self._storage = gathered.untyped_storage().data_ptr()
        return gathered

    def forget(self, saved: Tensor) -> Any:
        """Replaces a view of the gathered tensor by its geometry; keeps everything else."""
        if saved.untyped_storage().data_ptr() != self._storage:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()

    def recall(self, remembered: Any) -> Tensor:
        if isinstance(remembered, Tensor):
            return remembered
        if self.gathered is None:
            self.gathered = self.gather(self.part)
        return self.gathered.as_strided(*remembered)

    def scatter(self, gradient_TBGW: Tensor) -> Tensor:
        """This rank's part of the sum over all ranks; frees the gathered tensors, which the kernel no longer needs."""
        self.gathered = None
        gathered = torch.empty_like(gradient_TBGW, memory_format=torch.contiguous_format)
        gathered.index_copy_(0, self.key_order, gradient_TBGW)
        part = torch.empty_like(self.part)
        torch.distributed.reduce_scatter_tensor(part, gathered, group=self.group)
        return part


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, packs: GatheredPacks) -> Tensor:
        ctx.packs = packs
        return packs.start(part)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packs.scatter(gradient), None
