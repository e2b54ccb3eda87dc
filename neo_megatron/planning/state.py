"""Bytes of parameters, gradients and optimizer state on one rank, as Megatron allocates them.

Megatron lays the trained parameters of a chunk consecutively into a gradient buffer, last first, in buckets. Under
the distributed optimizer it pads parameters and buckets (megatron.core.optimizer.param_layout), keeps the parameters
themselves in a buffer of the same layout, and gives each rank an equal part of every bucket, to hold optimizer state
for. Frozen parameters are in none of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm

from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.layout import Chunk, Layout
from neo_megatron.planning.parameters import Parameter, parameters_of

# Adam's two moments, and the float32 parameters of a 16-bit model.
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
        state_rank: number among the `layout.state_ranks` that hold the same parameters. All hold the same, except for
            padding, of which the first rank has least.
    """
    chunks = layout.chunks(sizes)[pipeline_rank]
    return sum(
        (
            _chunk_state(
                sizes,
                chunk,
                training_stage,
                layout.tensor_model_parallel_size,
                layout.pipeline_model_parallel_size > 1,
                layout.parameter_bytes,
                layout.use_distributed_optimizer,
                layout.state_ranks,
                _bucket_limit(layout, pipeline_rank, number),
                state_rank,
            )
            for number, chunk in enumerate(chunks)
        ),
        State(),
    )


def buffer_elements(sizes: NeoSizes, layout: Layout, training_stage: int, pipeline_rank: int) -> int:
    """Elements of the gradient buffers of one rank, which are reduced over all ranks with the same parameters."""
    return rank_state(sizes, layout, training_stage, pipeline_rank).gradients // MAIN_GRADIENT


@cache
def _chunk_state(
    sizes: NeoSizes,
    chunk: Chunk,
    training_stage: int,
    tensor: int,
    pipelined: bool,
    element: int,
    distributed: bool,
    ranks: int,
    bucket_limit: int | None,
    state_rank: int,
) -> State:
    parameters = parameters_of(sizes, chunk, training_stage, tensor, pipelined)
    trained = [parameter for parameter in parameters if parameter.trained]
    frozen = sum(parameter.elements for parameter in parameters if not parameter.trained)
    if distributed:
        buckets = gradient_buckets(trained, ranks, bucket_limit)
        buffer = sum(bucket.size for bucket in buckets)
        owned = sum(bucket.owned(state_rank, ranks) for bucket in buckets)
    else:
        buffer = owned = sum(parameter.elements for parameter in trained)
    master = MOMENTS + (MAIN_PARAMETER if element < 4 else 0)
    return State(element * (frozen + buffer), MAIN_GRADIENT * buffer, master * owned)


def _bucket_limit(layout: Layout, pipeline_rank: int, chunk: int) -> int | None:
    """Elements after which a bucket ends: Megatron cuts the buffer of the first chunk only, and with overlap only."""
    if layout.overlap_grad_reduce and pipeline_rank == 0 and chunk == 0:
        return max(40_000_000, 1_000_000 * layout.state_ranks)
    return None


def gradient_buckets(trained: Sequence[Parameter], ranks: int, limit: int | None) -> list[Bucket]:
    """The buckets of a chunk under the distributed optimizer.

    Args:
        trained: in the order of the modules.
        ranks: that each bucket is divided over.
        limit: elements after which a bucket ends; without it only a shared embedding has a bucket of its own.
    """
    buckets: list[Bucket] = []
    ranges: list[tuple[int, int]] = []

    def close(end: int) -> None:
        buckets.append(Bucket(_round_up(end, lcm(ranks, 128)), tuple(ranges)))
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
