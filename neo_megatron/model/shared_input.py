"""Column-parallel products that share their normalised input: `linear_qkv` and `linear_qk_hw`.

Under tensor parallelism a column-parallel layer gathers its input (sequence parallelism) and sums the gradient of that
input over the ranks. Two layers of one input would do both twice; here it is done once, outside of them.

Without tensor parallelism Transformer Engine's fused norm and product hands the normalised input on. It could hand on
the gathered one too (`return_layernorm_output_gathered`), but 2.20 drops the gradient of that output: with tensor
parallelism the norm stays a module of its own.
"""

from copy import copy
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup

from neo_megatron.model.transformer_config import NeoConfig


def share_input(hidden_SBH: Tensor, group: ProcessGroup, sequence_parallel: bool) -> Tensor:
    """The whole sequence on every tensor-parallel rank; its gradient is summed over them, once for all that take it."""
    if sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, group=group)
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH, group=group)


class SharedInputColumnParallelLinear(ColumnParallelLinear):
    """Takes what `share_input` gives and communicates nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, disable_grad_reduce=True, **settings)
        self.sequence_parallel = False


class TESharedInputColumnParallelLinear(TEColumnParallelLinear):
    """The same of Transformer Engine."""

    def __init__(self, *args: Any, config: NeoConfig, **settings: Any) -> None:
        alone = copy(config)
        alone.sequence_parallel = alone.tp_comm_overlap = False
        super().__init__(*args, config=alone, **settings)
        self.parallel_mode = None  # the weight is split and marked as such; the products shall not reduce anything


class TENormColumnParallelLinear(TELayerNormColumnParallelLinear):
    """Norm and product in one; returns the normalised input where others return a bias. Without tensor parallelism."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.return_layernorm_output = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[S, B, H]`` -> the product ``[S, B, O]`` and the normalised input ``[S, B, H]``."""
        (product, normalised), _ = super().forward(x)
        return product, normalised
