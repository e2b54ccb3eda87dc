"""Native rotary positions: (t, h, w) of every token -> cosines and sines, computed once per micro-batch.

Everything here is float32 whatever the dtype of the model: at position 16384 a bfloat16 frequency is off by radians.
Frequencies are not buffers, so that `.bfloat16()` of the model cannot round them.

Shape suffixes: S sequence, B packs, G key-value heads, R query heads per key-value head, D channels of the rotated
part, F = D/2 frequencies.
"""

from dataclasses import dataclass
from typing import Any

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

    def rotate(self, x_SBGRD: Tensor, out_SBGRD: Tensor, back: bool = False) -> None:
        """Half-rotation as in Qwen3, written to ``out``: channel i and channel i + D/2 form a pair.

        Args:
            x_SBGRD: of any dtype.
            out_SBGRD: float32, or float64 to test it.
            back: rotate backwards, which inverts the rotation and is its gradient.
        """
        sign = -1 if back else 1
        first, second = x_SBGRD.to(out_SBGRD.dtype).chunk(2, dim=-1)
        out_first, out_second = out_SBGRD.chunk(2, dim=-1)
        torch.mul(first, self.cos, out=out_first).addcmul_(second, self.sin, value=-sign)
        torch.mul(second, self.cos, out=out_second).addcmul_(first, self.sin, value=sign)


@dataclass(frozen=True)
class NativeRotary:
    """The tables of the three axes of a micro-batch."""

    t: RotaryTable
    h: RotaryTable
    w: RotaryTable

    @classmethod
    def from_positions(
        cls, positions_BS3: Tensor, widths: tuple[int, int, int], theta_t: float, theta_hw: float
    ) -> "NativeRotary":
        """The tables of integer positions ``[B, S, 3]``, for so many channels for t, h and w."""

        def table(axis: int, width: int, theta: float) -> RotaryTable:
            # Contiguous, so that the tables are: the kernel of a GPU would copy them in every layer.
            position_SB = positions_BS3[..., axis].t().contiguous().float()
            angle = position_SB[..., None] * inverse_frequencies(width, theta, positions_BS3.device)
            return RotaryTable(angle.cos()[:, :, None, None], angle.sin()[:, :, None, None])

        return cls(t=table(0, widths[0], theta_t), h=table(1, widths[1], theta_hw), w=table(2, widths[2], theta_hw))

    @property
    def tables(self) -> tuple[RotaryTable, RotaryTable, RotaryTable]:
        return self.t, self.h, self.w

    def rotate(self, t_SBGRD: Tensor, h_SBGRD: Tensor, w_SBGRD: Tensor) -> Tensor:
        """Heads ``[S, B, G * R, X]`` from their parts, X channels in all."""
        return _RotatedParts.apply(self, t_SBGRD, h_SBGRD, w_SBGRD)


class _RotatedParts(torch.autograd.Function):
    """Writes every part to its place in the head, so that nothing is joined afterwards; the graph keeps the tables."""

    @staticmethod
    def forward(ctx: Any, rotary: NativeRotary, *parts: Tensor) -> Tensor:
        ctx.rotary, ctx.shapes = rotary, [part.shape for part in parts]
        widths = [part.shape[-1] for part in parts]
        exact = torch.promote_types(parts[0].dtype, torch.float32)
        heads = parts[0].new_empty(*parts[0].shape[:-1], sum(widths), dtype=exact)
        for table, part, place in zip(rotary.tables, parts, heads.split(widths, dim=-1), strict=True):
            table.rotate(part, place)
        return heads.to(parts[0].dtype).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, d_heads: Tensor) -> tuple[Tensor | None, ...]:
        widths = [shape[-1] for shape in ctx.shapes]
        places = d_heads.unflatten(2, ctx.shapes[0][2:4]).split(widths, dim=-1)
        exact = torch.promote_types(d_heads.dtype, torch.float32)
        d_parts = [d_heads.new_empty(shape, dtype=exact) for shape in ctx.shapes]
        for table, d_part, place in zip(ctx.rotary.tables, d_parts, places, strict=True):
            table.rotate(place, d_part, back=True)
        return None, *(d_part.to(d_heads.dtype) for d_part in d_parts)
