"""Native rotary positions: (t, h, w) of every token -> cosines and sines, computed once per micro-batch.

Everything here is float32 whatever the dtype of the model: at position 16384 a bfloat16 frequency is off by radians.
The frequencies are never buffers, so that no `.bfloat16()` of the model can reach them.

Shape suffixes: S sequence, B packs, D channels of the rotated part, F = D/2 frequencies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def inverse_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """``theta ** (-2i / width)`` for i in 0..width/2-1, float32 ``[width/2]`` (RoFormer, arXiv 2104.09864, eq. 15)."""
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    return 1.0 / theta**exponent


@dataclass(frozen=True)
class RotaryTable:
    """Cosine and sine of one axis, each float32 ``[S, B, 1, 1, F]``, ready to broadcast over groups and heads."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_SBGRD: Tensor) -> Tensor:
        """Half-rotation as in Qwen3: channel i and channel i + D/2 form a pair. Returns the dtype of the input."""
        first, second = x_SBGRD.chunk(2, dim=-1)
        rotated = torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)
        return rotated.to(x_SBGRD.dtype)


@dataclass(frozen=True)
class NativeRotary:
    """The tables of the three axes of a micro-batch."""

    t: RotaryTable
    h: RotaryTable
    w: RotaryTable

    @classmethod
    def from_positions(cls, positions_BS3: Tensor, head_dim: int, theta_t: float, theta_hw: float) -> "NativeRotary":
        """The tables of integer positions ``[B, S, 3]``; t rotates ``head_dim`` channels, h and w half as many."""

        def table(axis: int, width: int, theta: float) -> RotaryTable:
            position_SB = positions_BS3[..., axis].t().float()
            angle = position_SB[..., None] * inverse_frequencies(width, theta, positions_BS3.device)
            return RotaryTable(angle.cos()[:, :, None, None], angle.sin()[:, :, None, None])

        return cls(
            t=table(0, head_dim, theta_t), h=table(1, head_dim // 2, theta_hw), w=table(2, head_dim // 2, theta_hw)
        )
