"""Column-parallel products that share their normalised input: `linear_qkv` and `linear_qk_hw`.

Under tensor parallelism a column-parallel layer gathers its input (sequence parallelism) and sums the gradient of that
input over the ranks. Two layers of one input would do both twice; here it is done once, outside of them.

What was gathered does not outlive the forward, as in Megatron's layers: it is gathered a second time, once for both,
while the backward of the attention computes.

Without tensor parallelism Transformer Engine's fused norm and product passes the normalised input on. It could pass on
the gathered one too (`return_layernorm_output_gathered`), but 2.20 drops the gradient of that output: with tensor
parallelism the norm stays a module of its own.
"""

from copy import copy
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup

from neo_megatron.model.transformer_config import NeoConfig


def keeps_input(config: NeoConfig) -> bool:
    """Whether the products keep their input for the backward, rather than copies in FP8."""
    return not (config.fp8 and config.fp8_recipe == "delayed")


def share_input(hidden_SBH: Tensor, group: ProcessGroup, sequence_parallel: bool) -> Tensor:
    """The complete sequence on every tensor-parallel rank; its gradient is summed over ranks once for all uses."""
    if sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, group=group)
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH, group=group)


def gather_again(gathered_TBH: Tensor, part_SBH: Tensor, group: ProcessGroup, context: Tensor, query: Tensor) -> None:
    """Frees the memory of a gathered tensor, which products keep for their backward, and refills it in time.

    The tensor keeps its identity, as in FSDP: `saved_tensors_hooks` would cost the parameters, saved next to it, the
    attributes through which Megatron's layers add to their gradients.

    Args:
        gathered_TBH: result of `share_input`, after all its uses in the forward.
        part_SBH: argument of `share_input`.
        context: the gradient of this tensor comes long before that of the products: gathering begins.
        query: and this one just before: gathering must have ended.
    """
    if not context.requires_grad:
        return
    size = gathered_TBH.untyped_storage().nbytes()
    gathered_TBH.untyped_storage().resize_(0)
    # `data` counts its changes apart: to autograd the tensor has not changed. What is pending is taken out when used,
    # since hooks live as long as the graph of all layers.
    pending: list[Any] = [(gathered_TBH.data, part_SBH.detach())]

    def begin(_gradient: Tensor) -> None:
        buffer, part = pending.pop()
        buffer.untyped_storage().resize_(size)
        pending.append(torch.distributed.all_gather_into_tensor(buffer, part.contiguous(), group=group, async_op=True))

    def end(_gradient: Tensor) -> None:
        pending.pop().wait()

    context.register_hook(begin)
    query.register_hook(end)


class SharedInputColumnParallelLinear(ColumnParallelLinear):
    """Takes the result of `share_input` and does not communicate."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, disable_grad_reduce=True, **settings)
        self.sequence_parallel = False


class TESharedInputColumnParallelLinear(TEColumnParallelLinear):
    """The same with Transformer Engine.

    Under tensor parallelism it keeps its input as it is and quantizes it again in the backward: the tensor is then one
    for both products, may be freed in between, and so may the norm's output. Delayed scaling, whose scale will have
    moved on, keeps an FP8 copy for each product instead.
    """

    def __init__(self, *args: Any, config: NeoConfig, **settings: Any) -> None:
        alone = copy(config)
        alone.sequence_parallel = alone.tp_comm_overlap = False
        super().__init__(*args, config=alone, **settings)
        self.parallel_mode = None  # the weight is split and marked as such; the products shall not reduce anything
        self.save_original_input = config.tensor_model_parallel_size > 1 and keeps_input(config)


class TENormColumnParallelLinear(TELayerNormColumnParallelLinear):
    """Norm and product in one; returns the normalised input where others return a bias. Without tensor parallelism."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.return_layernorm_output = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[S, B, H]`` -> the product ``[S, B, O]`` and the normalised input ``[S, B, H]``."""
        (product, normalised), _ = super().forward(x)
        return product, normalised
