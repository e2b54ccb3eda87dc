"""Initial values of tensors that no checkpoint provides, by the rules of the table in `names.py`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neo_megatron.checkpoint.names import HfTensor, Start
from neo_megatron.checkpoint.streaming import copy_exactly
from neo_megatron.errors import CheckpointError


class StartValues:
    """Draws one tensor after the other from a seed.

    Args:
        seed: of what is drawn; the values also follow from the order in which they are asked for.
        head_dim: width of a head, whose quarters go to rows and columns.
        read: Hugging Face name -> the tensor, for what starts from another.
    """

    def __init__(self, seed: int, head_dim: int, read: Callable[[str], Tensor]) -> None:
        self._draw, self._head_dim, self._read = torch.Generator().manual_seed(seed), head_dim, read

    def fill(self, view: Tensor, tensor: HfTensor) -> None:
        """Writes the value of a tensor into memory of as many values."""
        copy_exactly(view, self.value(tensor).view(view.shape))

    def value(self, tensor: HfTensor) -> Tensor:
        """In float32 where it is drawn or constant, else in the type of what it starts from."""
        start = tensor.start
        match start.kind:
            case "normal":
                return torch.empty(tensor.shape).normal_(0, start.number, generator=self._draw)
            case "uniform":
                return torch.empty(tensor.shape).uniform_(-start.number, start.number, generator=self._draw)
            case "constant":
                return torch.full(tensor.shape, start.number)
            case "copy":
                return self._read(start.of)
            case "rows and columns":
                return rows_and_columns(self._read(start.of), self._head_dim)


def missing_starts(missing: Sequence[str], tensors: dict[str, HfTensor]) -> dict[str, Start]:
    """Initialization of each missing Hugging Face tensor.

    Raises:
        CheckpointError: one starts from another that is missing too.
    """
    starts = {name: tensors[name].start for name in missing}
    for name, start in starts.items():
        if start.of in starts:
            raise CheckpointError(f"{name} starts as {start}, which is missing too: give a checkpoint that has either")
    return starts


def rows_and_columns(projection: Tensor, head_dim: int) -> Tensor:
    """First and third quarter of every head's rows, twice: for h and for w."""
    quarters = projection.unflatten(0, (-1, 4, head_dim // 4))
    return quarters[:, [0, 2, 0, 2]].flatten(0, 2)
