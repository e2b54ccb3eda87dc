"""RMSNorm with a backward of its own.

On a CPU PyTorch has no kernel for the gradient and composes it of a dozen operations, each with a new tensor.

Shape suffixes: N rows, D channels.
"""

from typing import Any

import torch
from torch import Tensor


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
