"""The memory of every pipeline rank: state, activations of the micro-batches in flight, and temporary buffers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import ge, mul

from neo_megatron.model.config import LOGIT_BYTES, NeoSizes
from neo_megatron.model.context_parallel_cost import buffer_bytes, default_way
from neo_megatron.planning.activations import chunk_bytes, expert_tokens, layer_activations, rank_tokens
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.parameters import chunk_parameters
from neo_megatron.planning.state import State, rank_state
from neo_megatron.planning.workload import Workload


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank.

    Attributes:
        fp8_weights: under FP8, the 8-bit forms of the layers' matrices, as they are and transposed. With
            `fp8_param_gather` these two bytes are the parameters themselves, in place of two of bfloat16.
        activations: kept for the backward by all micro-batches in flight, at the worst moment.
        working: in addition, of the layer or head at work: gradients, gathered inputs, what is recomputed.
    """

    state: State
    fp8_weights: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.state.total + self.fp8_weights + self.activations + self.working


def pipeline_memory(sizes: NeoSizes, layout: Layout, workload: Workload, training_stage: int) -> list[RankMemory]:
    """The memory of each pipeline rank; ranks that differ in anything else hold the same."""
    memory = []
    working = {head: working_bytes(sizes, layout, workload, head) for head in (False, True)}
    all_chunks = layout.alike_chunks(sizes)
    kept = {
        chunk: chunk_bytes(sizes, layout, workload, chunk, training_stage)
        for chunk in dict.fromkeys(sum(all_chunks, ()))
    }
    for rank, chunks in enumerate(all_chunks):
        fp8_weights = 0.0
        if layout.precision == "fp8" and not layout.fp8_param_gather:
            parameters = [p for chunk in chunks for p in chunk_parameters(sizes, layout, chunk, training_stage)]
            fp8_weights = 2 * sum(p.total for p in parameters if p.quantized)
        memory.append(
            RankMemory(
                state=rank_state(sizes, layout, training_stage, rank),
                fp8_weights=fp8_weights,
                activations=peak_in_flight([kept[chunk] for chunk in chunks], rank, layout),
                working=working[any(chunk.head for chunk in chunks)],
            )
        )
    return memory


def peak_in_flight(chunk_bytes: Sequence[float], pipeline_rank: int, layout: Layout) -> float:
    """Most bytes kept at once under Megatron's schedules, 1F1B and interleaved 1F1B.

    A rank first runs some forwards, then a forward and a backward in turn. Interleaved, it takes as many micro-batches
    as there are ranks through one chunk, then through the next; backwards the chunks come in reverse.

    Args:
        chunk_bytes: what each chunk of the rank keeps of one micro-batch.
    """
    ranks = layout.pipeline_model_parallel_size
    # Later rounds repeat the first.
    micro_batches = min(layout.micro_batches, 4 * ranks)
    fullest = _in_flight(ranks, len(chunk_bytes), micro_batches, pipeline_rank)
    return max(sum(map(mul, counts, chunk_bytes)) for counts in fullest)


@cache
def _in_flight(ranks: int, chunks: int, micro_batches: int, pipeline_rank: int) -> list[tuple[int, ...]]:
    """Micro-batches that each chunk keeps just before a backward, where no other moment has more of each."""
    forward = [
        chunk
        for first in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for _ in range(first, min(first + ranks, micro_batches))
    ]
    backward = [chunks - 1 - chunk for chunk in forward]
    ahead = ranks - 1 - pipeline_rank
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * ranks
    kept, moments = [0] * chunks, set()
    for number, chunk in enumerate(forward):
        kept[chunk] += 1
        moments.add(tuple(kept))
        if number >= ahead:
            kept[backward[number - ahead]] -= 1

    def exceeded(counts: tuple[int, ...]) -> bool:
        return any(other != counts and all(map(ge, other, counts)) for other in moments)

    return [counts for counts in sorted(moments) if not exceeded(counts)]


def working_bytes(sizes: NeoSizes, layout: Layout, workload: Workload, head: bool) -> float:
    """The most that one layer, or the head, needs while it computes, in addition to what is kept."""
    x, _ = rank_tokens(layout, workload)
    e, tensor = layout.parameter_bytes, layout.tensor_model_parallel_size
    layer = layer_activations(sizes, layout, workload, frozen=False)
    exchanged = 0
    if layout.context_parallel_size > 1:
        heads, groups = sizes.num_attention_heads // tensor, sizes.num_query_groups // tensor
        ranks = layout.context_parallel_size
        way = layout.cp_comm_type or default_way(heads, groups, ranks)
        exchanged = max(buffer_bytes(way, int(x), heads, groups, sizes.attention_widths, ranks, e))
    # Gradients of the SwiGLU's input and output; its input gathered over tensor-parallel ranks, and the gradient of it.
    # For experts the same, with the tokens that go to those of this rank.
    rows, width = x, sizes.ffn_hidden_size / tensor
    if sizes.num_experts:
        rows, width = expert_tokens(sizes, layout, workload), sizes.expert_ffn_hidden_size / layout.expert_tensor_ranks
    gradients = rows * e * (3 * width + 2 * sizes.hidden_size)
    if sizes.num_experts and layout.expert_tensor_ranks > 1:  # which sum their outputs in float32
        gradients += rows * sizes.hidden_size * 4
    if layout.recompute_granularity == "full":
        layers = layout.recompute_num_layers if layout.recompute_method == "uniform" else 1
        again = layers * layer.total
    else:
        again = layer.total - layer.kept(layout)
    # Float32 probabilities are counted as kept, unless they are made a chunk at a time. In addition: logits, or later
    # their gradient, in 16 bits.
    probabilities = x * workload.trained_share * sizes.vocab_size / tensor * 4 if head else 0
    logits = min(probabilities, LOGIT_BYTES) * ((probabilities > LOGIT_BYTES) + (e / 4 if e < 4 else 0))
    return max(gradients + again, exchanged + again, logits + x * sizes.hidden_size * e)
