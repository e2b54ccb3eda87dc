"""Megatron's layer-wise optimizer, which shards Muon by matrices, patched so that it trains in float32, too.

Megatron wraps the optimizers of a rank's matrices for bfloat16 alone; in float32 it would call methods that they lack.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

_init = LayerWiseDistributedOptimizer.__init__


class _Float32Optimizer(FP32Optimizer):
    """Its state is laid out as that of the optimizer in bfloat16, the only one that the layer-wise one saves."""

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        return {"optimizer": super().sharded_state_dict(*arguments, **keywords)}


def _init_in_any_precision(
    optimizer: LayerWiseDistributedOptimizer,
    optimizers: Sequence[torch.optim.Optimizer],
    config: OptimizerConfig,
    pg_collection: Any = None,
    init_state_fn_list: Sequence[Callable] = (),
    model_chunks: list[torch.nn.Module] | None = None,
) -> None:
    _init(optimizer, optimizers, config, pg_collection, init_state_fn_list, model_chunks)
    if not config.bf16:
        optimizer.config = config
        pairs = zip(optimizers, init_state_fn_list, strict=True)
        optimizer.chained_optimizers = [_Float32Optimizer(one, config, init_state) for one, init_state in pairs]


LINES = {
    LayerWiseDistributedOptimizer: (
        "        if config.bf16:\n            for i in range(len(optimizers)):\n",
        "        super().__init__(optimizers)\n",
        "            if not sd['optimizer']['state']:\n",
    ),
}
PATCHES = ((LayerWiseDistributedOptimizer, "__init__", _init_in_any_precision),)
