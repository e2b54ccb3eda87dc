"""A SwiGLU whose output is computed again in the backward: `--recompute-modules mlp_act`."""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from neo_megatron.model.transformer_config import NeoConfig


class RecomputedMLP(MLP):
    """Megatron's MLP; between forward and backward it keeps the input of SwiGLU, but not its output.

    Megatron has the same for experts (`moe_act`).
    """

    def __init__(self, config: NeoConfig, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)
        if config.fp8:  # which would otherwise keep a copy of its input in 8 bits
            from megatron.core.extensions.transformer_engine import set_save_original_input

            set_save_original_input(self.linear_fc2)

    def forward(self, hidden_SBH: Tensor, **_unused: Any) -> tuple[Tensor, None]:
        """``[S, B, H]`` -> ``[S, B, H]`` and no bias; Megatron's layer also passes arguments for experts."""
        gate_up, _ = self.linear_fc1(hidden_SBH)
        activation = CheckpointWithoutOutput(self.config.fp8)
        output, _ = self.linear_fc2(activation.checkpoint(self._swiglu, gate_up))
        if torch.is_grad_enabled():
            activation.discard_output_and_register_recompute(output)
        return output, None

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        if self.config.bias_activation_fusion:
            return bias_swiglu_impl(gate_up, None)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
