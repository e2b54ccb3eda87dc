"""Bytes of parameters, gradients and optimizer state on one rank, as Megatron allocates them.

Megatron lays the trained parameters of a chunk behind one another into a gradient buffer, last first, in buckets. Under
the distributed optimizer it pads parameters and buckets (megatron.core.optimizer.param_layout), keeps the parameters
themselves in a buffer of the same layout, and gives each rank an equal part of every bucket, to hold optimizer state
for. Frozen parameters are in none of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.parameters import Parameter, chunk_parameters

# Adam's two moments, and the float32 parameters that a 16-bit model is trained by.
MOMENTS, MAIN_PARAMETER, MAIN_GRADIENT = 2 * 4, 4, 4


@dataclass(frozen=True)
class State:
    """Bytes on one rank."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: "State") -> "State":
        return State(
            self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


@dataclass(frozen=True)
class Bucket:
    """Elements of a bucket, padding included, and where its parameters begin and end in it."""

    size: int
    ranges: tuple[tuple[int, int], ...]

    def owned(self, rank: int, ranks: int) -> int:
        """Elements of parameters in the part of one rank."""
        part = self.size // ranks
        start, end = rank * part, (rank + 1) * part
        return sum(max(0, min(end, last) - max(start, first)) for first, last in self.ranges)


def rank_state(sizes: NeoSizes, layout: Layout, training_stage: int, pipeline_rank: int, state_rank: int = 0) -> State:
    """The state of one rank.

    Args:
        state_rank: number among the `layout.state_ranks` that hold the same parameters. All have the same but for
            padding, of which the first has least.
    """
    total = State()
    element = layout.parameter_bytes
    master = MOMENTS + (MAIN_PARAMETER if layout.precision != "fp32" else 0)
    for number, chunk in enumerate(layout.chunks(sizes)[pipeline_rank]):
        parameters = chunk_parameters(sizes, layout, chunk, training_stage)
        trained = [parameter for parameter in parameters if parameter.trained]
        frozen = sum(parameter.elements for parameter in parameters if not parameter.trained)
        if layout.use_distributed_optimizer:
            buckets = gradient_buckets(trained, layout, bucketed=pipeline_rank == 0 and number == 0)
            buffer = sum(bucket.size for bucket in buckets)
            owned = sum(bucket.owned(state_rank, layout.state_ranks) for bucket in buckets)
        else:
            buffer = owned = sum(parameter.elements for parameter in trained)
        total += State(element * (frozen + buffer), MAIN_GRADIENT * buffer, master * owned)
    return total


def gradient_buckets(trained: Sequence[Parameter], layout: Layout, bucketed: bool) -> list[Bucket]:
    """The buckets of a chunk under the distributed optimizer.

    Args:
        trained: in the order of the modules.
        bucketed: whether the buffer is cut: Megatron cuts that of the first chunk only, and with overlap only.
    """
    limit = None
    if bucketed and layout.overlap_grad_reduce:
        limit = max(40_000_000, 1_000_000 * layout.state_ranks)
    buckets: list[Bucket] = []
    ranges: list[tuple[int, int]] = []

    def close(end: int) -> None:
        buckets.append(Bucket(_round_up(end, lcm(layout.state_ranks, 128)), tuple(ranges)))
        ranges.clear()

    for parameter in reversed(trained):
        start = _round_up(ranges[-1][1], 64) if ranges else 0
        if parameter.shared_embedding and ranges:  # has a bucket of its own
            close(start)
            start = 0
        ranges.append((start, start + parameter.elements))
        if parameter.shared_embedding or (limit is not None and ranges[-1][1] >= limit):
            close(ranges[-1][1])
    if ranges:
        close(ranges[-1][1])
    return buckets


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
