"""RMSNorm where Megatron expects a norm.

Shape suffixes: D channels.
"""

import torch
from torch import Tensor

from neo_megatron.model.cpu_kernels.rms_norm import CpuRMSNorm
from neo_megatron.model.transformer_config import NeoConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm; unlike Megatron's `WrappedTorchNorm` it runs under sequence parallelism."""

    def __init__(self, config: NeoConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each rank normalises its part of the sequence: Megatron sums the gradients over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        return super().forward(x) if x.is_cuda else CpuRMSNorm.apply(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """The norm of a part of each head, which `qkv_prepare.py` applies together with all that follows it.

    It returns its weight when called, rather than being read: Megatron's hooks on modules wait for a parameter that is
    still being gathered.
    """

    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight ``[D]``."""
        return self.weight
