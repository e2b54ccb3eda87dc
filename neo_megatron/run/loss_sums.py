"""The loss of each data set and of each modality, as sums over the ranks that compute the loss.

A step adds to one table on the device and waits for nothing. The table is reduced once when it is written: at the end
of a `--log-interval`, or of an evaluation.
"""

import math

import torch
from megatron.core import parallel_state
from torch import Tensor

from neo_megatron.data.shards.reader import SAMPLE_MODALITIES


class LossSums:
    """Weighted losses and weights by data set and modality; empty until a loss is added.

    Args:
        parts: of the table; groups of part p are those of `PackDataset` + p * data sets * modalities.

    Attributes:
        data_sets: their names.
        table: float64 ``[parts, data sets, modalities, 2]`` on the device: sums of weight * loss, and of weights;
            ``None`` where no loss was added, as on all but the last pipeline stage.
    """

    def __init__(self, parts: int = 1) -> None:
        self._parts = parts
        self.data_sets: tuple[str, ...] = ()
        self.table: Tensor | None = None

    def add(self, data_sets: tuple[str, ...], group_M: Tensor, weight_M: Tensor, nll_M: Tensor) -> None:
        """Adds the losses of a micro-batch, without synchronising with the device.

        Args:
            data_sets: names, the same in every call.
            group_M: see `PackDataset.__getitem__`, ``target_group``.
            weight_M, nll_M: float32 ``[M]``, see `WeightedLoss`.
        """
        if self.table is None:
            self.data_sets = data_sets
            shape = self._parts, len(data_sets), len(SAMPLE_MODALITIES), 2
            self.table = torch.zeros(shape, dtype=torch.float64, device=nll_M.device)
        weight = weight_M.double()
        pairs = torch.stack((weight * nll_M.detach().double(), weight), dim=1)
        self.table.view(-1, 2).index_add_(0, group_M, pairs)

    def take(self, other: "LossSums") -> None:
        """Adds the sums of another, and empties it."""
        if other.table is not None:
            self.table = other.table if self.table is None else self.table + other.table
            self.data_sets, other.table = other.data_sets, None

    def reduce(self) -> list["Losses"]:
        """The losses of each part; empties the table. All ranks of the last pipeline stage must call it, others may."""
        table, self.table = self.table, None
        if table is None:
            table = torch.zeros(self._parts, 0, len(SAMPLE_MODALITIES), 2, dtype=torch.float64)
            return [Losses((), part) for part in table]
        # Tensor-parallel ranks have the same sums.
        torch.distributed.all_reduce(table, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return [Losses(self.data_sets, part) for part in table.cpu()]


class Losses:
    """Sums over all ranks, see `LossSums`.

    Attributes:
        table: float64 ``[data sets, modalities, 2]`` on the CPU.
    """

    def __init__(self, data_sets: tuple[str, ...], table: Tensor) -> None:
        self.table = table
        self._data_sets = data_sets

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(self._data_sets, self.table + other.table)

    @property
    def with_images(self) -> float:
        """Mean loss of all samples with images; not a number without any."""
        total, weight = self.table[:, 1:].sum(dim=(0, 1)).tolist()
        return total / weight if weight else math.nan

    @property
    def by_modality(self) -> dict[str, float]:
        """Mean losses; without modalities that have no weight."""
        return _means(SAMPLE_MODALITIES, self.table.sum(dim=0))

    def scalars(self, loss: str) -> dict[str, float]:
        """Scalars whose tags begin with the name of the loss; none for what has no weight."""
        of = {"modality": self.by_modality, "data set": _means(self._data_sets, self.table.sum(dim=1))}
        return {f"{loss} by {kind}/{name}": value for kind, means in of.items() for name, value in means.items()}

    def line(self) -> list[str]:
        """Losses by modality for a line of the log; none where all samples are of one modality."""
        means = self.by_modality
        text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        return [f"loss by modality: {text}"] if len(means) > 1 else []


def _means(names: tuple[str, ...], sums: Tensor) -> dict[str, float]:
    """Args: sums: ``[names, 2]``."""
    return {name: total / weight for name, (total, weight) in zip(names, sums.tolist(), strict=True) if weight}
