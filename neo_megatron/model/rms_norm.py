"""RMSNorm where Megatron expects a norm, with a backward of its own on a CPU.

On a CPU PyTorch has no kernel for the gradient and composes it of a dozen operations, each with a new tensor.

Shape suffixes: N rows, D channels.
"""

from typing import Any

import torch
from torch import Tensor

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


class CpuRMSNorm(torch.autograd.Function):
    """``apply(x [..., D], weight [D], eps)``: ``x * rsqrt(mean(x * x) + eps) * weight`` in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(exact, inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """With y = x * inverse * weight: dx = inverse * (weight * dy - x * inverse^2 * mean(x * weight * dy))."""
        x, weight, inverse = ctx.saved_tensors
        x, w, d_y = (tensor.to(inverse.dtype) for tensor in (x, weight, d_out))
        product_ND = (x * d_y).reshape(-1, x.shape[-1])
        d_weight = (product_ND.T @ inverse.flatten()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = (product_ND @ w).view_as(inverse).mul_(inverse.pow(3)).div_(x.shape[-1])
        d_x = torch.mul(d_y, w).mul_(inverse).addcmul_(x, along, value=-1)
        return d_x.to(d_out.dtype), d_weight, None
