"""Bytes of parameters, gradients and optimizer state on one rank, as Megatron allocates them.

Megatron lays the trained parameters of a chunk consecutively into a gradient buffer, last first, in buckets. Under
the distributed optimizer it pads parameters and buckets (megatron.core.optimizer.param_layout), keeps the parameters
themselves in a buffer of the same layout, and gives each rank an equal part of every bucket, to hold optimizer state
for. With Muon, matrices have a buffer of their own, in which each lies in the part of one rank, and one momentum in
place of two moments. Frozen parameters are in none of these. Experts that are divided otherwise than the rest of the
model have buffers of their own, which belong to the ranks that hold the same experts.

Megatron-FSDP shards what its strategy says; what it gathers, and gradients that wait to be reduced, are counted at
their most, without padding.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import lcm

from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.layout import Chunk, Layout
from neo_megatron.planning.parameters import Division, Parameter, parameters_of

# Adam's two moments, Muon's momentum, and the float32 parameters of a 16-bit model.
MOMENTS, MOMENTUM, MAIN_PARAMETER, MAIN_GRADIENT = 2 * 4, 4, 4, 4


_FILL = 0.9  # of a bucket of matrices, as Megatron fills it before it begins the next one


@dataclass(frozen=True)
class State:
    """Bytes on one rank."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def buffer_elements(self) -> int:
        """Elements of the gradient buffers."""
        return self.gradients // MAIN_GRADIENT

    def __add__(self, other: "State") -> "State":
        return State(
            self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer
        )

    def __mul__(self, times: int) -> "State":
        return State(self.parameters * times, self.gradients * times, self.optimizer * times)


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
        state_rank: number among the `layout.state_ranks` that hold the same parameters as the first tensor-parallel
            rank. All hold the same, except for padding, of which the first rank has least.
    """
    dense, experts = divided_state(sizes, layout, training_stage, pipeline_rank, state_rank)
    return dense + experts


def divided_state(
    sizes: NeoSizes, layout: Layout, training_stage: int, pipeline_rank: int, state_rank: int = 0
) -> tuple[State, State]:
    """The state that `layout.state_ranks` hold together, and that of experts, which `layout.expert_state_ranks` hold.

    Experts that are divided as the rest of the model are part of the first.
    """
    return _divided_states(sizes, layout.of_state, training_stage, state_rank)[pipeline_rank]


@cache
def _divided_states(sizes: NeoSizes, layout: Layout, training_stage: int, state_rank: int) -> list[tuple[State, State]]:
    """Of all pipeline ranks."""
    ranks = range(layout.pipeline_model_parallel_size)
    return [_divided_state(sizes, layout, training_stage, rank, state_rank) for rank in ranks]


def _divided_state(
    sizes: NeoSizes, layout: Layout, training_stage: int, pipeline_rank: int, state_rank: int
) -> tuple[State, State]:
    chunks, division = layout.alike_chunks(sizes)[pipeline_rank], Division.of(layout)
    if layout.use_megatron_fsdp:
        return _fully_sharded_state(layout, fully_sharded_elements(sizes, layout, training_stage)), State()

    def state(experts: bool | None, ranks: int, rank: int) -> State:
        first, others = (_bucket_limit(layout, pipeline_rank, number) for number in (0, 1))
        settings = (layout.parameter_bytes, layout.use_distributed_optimizer, layout.optimizer == "muon", ranks)
        state = _chunk_state(sizes, chunks[0], training_stage, division, experts, *settings, first, rank)
        for chunk, count in Counter(chunks[1:]).items():
            state += _chunk_state(sizes, chunk, training_stage, division, experts, *settings, others, rank) * count
        return state

    if not layout.experts_apart:
        return state(None, layout.state_ranks, state_rank), State()
    # Ranks are numbered tensor first; those with different experts follow each other, and then these again.
    expert_rank = state_rank * layout.expert_state_ranks // layout.state_ranks
    return state(False, layout.state_ranks, state_rank), state(True, layout.expert_state_ranks, expert_rank)


@dataclass(frozen=True)
class Elements:
    """Elements of the parameters that Megatron-FSDP divides over its ranks.

    Attributes:
        trained: those that train.
        layers: of all layers, which are gathered and freed one by one; `layer` of them is one.
        others: which stay gathered from their first use to the end of a step.
    """

    trained: int
    layers: int
    layer: int
    others: int


def fully_sharded_elements(sizes: NeoSizes, layout: Layout, training_stage: int) -> Elements:
    """See `Elements`."""
    ((chunk,),) = layout.alike_chunks(sizes)
    division = Division.of(layout)
    parameters = parameters_of(sizes, chunk, training_stage, division)
    others = sum(p.total for p in parameters_of(sizes, replace(chunk, layers=0), training_stage, division))
    layers = sum(p.total for p in parameters) - others
    return Elements(sum(p.total for p in parameters if p.trained), layers, layers // chunk.layers, others)


def _fully_sharded_state(layout: Layout, elements: Elements) -> State:
    def shard(count: int) -> int:
        return -(-count // layout.state_ranks)

    at_once = layout.suggested_communication_unit_size
    parameters, gradients = elements.layers + elements.others, elements.trained
    if layout.shards_parameters:
        gathered = min(elements.layers, at_once // 2 + elements.layer)
        parameters = shard(parameters) + elements.others + gathered
    if layout.shards_gradients:
        gradients = shard(gradients) + min(gradients, at_once + elements.layer)
    element = layout.parameter_bytes
    master = MOMENTS + (MAIN_PARAMETER if element < 4 else 0)
    return State(element * parameters, MAIN_GRADIENT * gradients, master * shard(elements.trained))


@cache
def _chunk_state(
    sizes: NeoSizes,
    chunk: Chunk,
    training_stage: int,
    division: Division,
    experts: bool | None,
    element: int,
    distributed: bool,
    muon: bool,
    ranks: int,
    bucket_limit: int | None,
    state_rank: int,
) -> State:
    """Of all parameters; or of `experts` alone, or of the others."""
    parameters = parameters_of(sizes, chunk, training_stage, division)
    if experts is not None:
        parameters = tuple(parameter for parameter in parameters if parameter.expert == experts)
    trained = [parameter for parameter in parameters if parameter.trained]
    frozen = sum(parameter.total for parameter in parameters if not parameter.trained)
    state = State(element * frozen)
    for is_matrix, moments in ((False, MOMENTS), (True, MOMENTUM)) if muon else ((None, MOMENTS),):
        held = [parameter for parameter in trained if is_matrix is None or parameter.matrix == is_matrix]
        if distributed:
            buckets = (matrix_buckets if is_matrix else gradient_buckets)(held, ranks, bucket_limit)
            buffer = sum(bucket.size for bucket in buckets)
            owned = sum(bucket.owned(state_rank, ranks) for bucket in buckets)
        else:
            buffer = owned = sum(parameter.total for parameter in held)
        master = moments + (MAIN_PARAMETER if element < 4 else 0)
        state += State(element * buffer, MAIN_GRADIENT * buffer, master * owned)
    return state


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

    for parameter in _one_by_one(reversed(trained), limit):
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


def matrix_buckets(matrices: Sequence[Parameter], ranks: int, limit: int | None) -> list[Bucket]:
    """As `gradient_buckets`, of the matrices that Muon updates, none of which is cut between two ranks.

    Of a bucket's matrices the largest goes first, each to the rank with the least so far.
    """
    buckets: list[Bucket] = []
    waiting: list[int] = []

    def close() -> None:
        ends = [(0, rank) for rank in range(ranks)]
        places = []
        for elements in sorted(waiting, reverse=True):
            end, rank = heapq.heappop(ends)
            start = _round_up(end, 64)
            places.append((rank, start, start + elements))
            heapq.heappush(ends, (start + elements, rank))
        part = _round_up(max(ends)[0], lcm(64, lcm(ranks, 128) // ranks))
        ranges = tuple((rank * part + start, rank * part + end) for rank, start, end in places)
        buckets.append(Bucket(part * ranks, ranges))
        waiting.clear()

    total = largest = 0
    for matrix in reversed(matrices):
        for _ in range(matrix.count):
            waiting.append(matrix.elements)
            total, largest = total + matrix.elements, max(largest, matrix.elements)
            if limit is not None and total >= max(limit, int(ranks * largest * _FILL)):
                close()
                total = largest = 0
    if waiting:
        close()
    return buckets


def _one_by_one(parameters: Iterable[Parameter], limit: int | None) -> Iterator[Parameter]:
    """Splits runs of parameters, unless neither padding nor the end of a bucket can lie within them."""
    for parameter in parameters:
        if parameter.count == 1 or (limit is None and parameter.elements % 64 == 0):
            yield replace(parameter, elements=parameter.total, count=1)
        else:
            yield from [replace(parameter, count=1)] * parameter.count


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
