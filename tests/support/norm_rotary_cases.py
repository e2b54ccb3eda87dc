"""Layers whose queries, keys and values `NormRotary` prepares: shapes, random numbers, results and their errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neo_megatron.model import qkv_prepare
from neo_megatron.model.native_rope import NativeRotary

EPS = 1e-6
# Errors of float32: of heads, and of gradients.
BOUNDS = 2e-6, 5e-6


@dataclass(frozen=True)
class Case:
    """A layer.

    Args:
        form: of the attention.
        shape: tokens, packs, key-value heads, query heads of each, and channels of a value.
        dtype: of projections.
        frozen: places of the tensors without a gradient, in the order of `tensors`.
        norms: dtype of norms, if another one.
        strides: how gradients of heads lie: "plain", "heads first", or "expanded", where all are one number.
    """

    form: str
    shape: tuple[int, int, int, int, int]
    dtype: str = "float32"
    frozen: tuple[int, ...] = ()
    norms: str = ""
    strides: str = "plain"

    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels of the norms of a head, and those for t, h and w."""
        width = self.shape[-1]
        if self.form == "separate":
            return (width, width // 2, width // 2), (width, width // 2, width // 2)
        return (width // 2, width // 2), (width // 2, width // 4, width // 4)

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        """Projections, norms of queries, norms of keys."""
        draw = torch.Generator().manual_seed(0)
        tokens, packs, groups, heads, width = self.shape
        norms, _ = self.widths()
        counts = (heads + 2, heads + 1)[: 1 + (self.form == "separate")]
        projections = [torch.randn(tokens, packs, groups, count, width, generator=draw) for count in counts]
        weights = [torch.rand(width, generator=draw) + 0.5 for _ in range(2) for width in norms]
        tensors = [projection.to(getattr(torch, self.dtype)) for projection in projections]
        tensors += [weight.to(getattr(torch, self.norms or self.dtype)) for weight in weights]
        return [x.to(device).requires_grad_(place not in self.frozen) for place, x in enumerate(tensors)]

    def tables(self, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines for t, h and w."""
        tokens, packs, *_ = self.shape
        positions = torch.randint(0, 99, (packs, tokens, 3), generator=torch.Generator().manual_seed(1))
        rotary = NativeRotary.from_positions(positions, self.widths()[1], 1e6, 1e4)
        return [(table.cos.to(device), table.sin.to(device)) for table in rotary.tables]

    def towards(self, heads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of heads, as a layer of `dtype` gets them, in the dtype of the heads."""
        draw = torch.Generator().manual_seed(2)
        gradients = []
        for head in heads:
            gradient = torch.randn(head.shape, generator=draw).to(getattr(torch, self.dtype)).to(head)
            if self.strides == "heads first":
                gradient = gradient.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
            if self.strides == "expanded":
                gradient = gradient.flatten()[0].expand(head.shape)
            gradients.append(gradient)
        return gradients


def at_once(tables: Sequence[tuple[Tensor, Tensor]], eps: float, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The reference with the arguments of `NormRotary.apply`."""
    first, norms = (2, 3) if len(tensors) == 8 else (1, 2)
    return qkv_prepare.at_once(tensors[:first], tensors[first:-norms], tensors[-norms:], tables, eps)


def results(
    function: Callable[..., tuple[Tensor, ...]], case: Case, device: str = "cpu", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Heads, and the gradients of all tensors that are not frozen; computed in the dtype of the case, or in another."""
    tensors, tables = case.tensors(device), case.tables(device)
    if dtype:
        tensors = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in tensors]
        tables = [(cos.to(dtype), sin.to(dtype)) for cos, sin in tables]
    heads = function(tables, EPS, *tensors)
    needed = [x for x in tensors if x.requires_grad]
    pairs = [(head, towards) for head, towards in zip(heads, case.towards(heads), strict=True) if head.requires_grad]
    return [*heads, *torch.autograd.grad([head for head, _ in pairs], needed, [towards for _, towards in pairs])]


def excess(actual: Tensor, expected: Tensor, bound: float) -> float:
    """The error over the allowed one, which is `bound` in float32: relative, of the tensor.

    In 16 bits each number may be off by its own rounding, and by that bound of the tensor's mean square.
    """
    error = actual.double() - expected
    if actual.dtype == torch.float32:
        return (error.norm() / expected.norm() / bound).item()
    allowed = torch.finfo(actual.dtype).eps / 2 * expected.abs() + bound * expected.square().mean().sqrt()
    return (error.abs() / allowed).max().item()


def excesses(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """That of each of `results`."""
    bounds = [BOUNDS[0]] * 3 + [BOUNDS[1]] * (len(actual) - 3)
    return [excess(*each) for each in zip(actual, expected, bounds, strict=True)]
