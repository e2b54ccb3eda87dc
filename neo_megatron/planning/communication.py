"""Bytes that one rank sends in a step, by kind.

A ring all-reduce of b bytes over r ranks sends 2 b (r - 1) / r from each, an all-gather or a reduce-scatter half as
much; an all-to-all of b bytes sends b (r - 1) / r. Megatron's own traffic is counted; a few numbers per token (cross
entropy, gradient norms), and once in a step the gradients of norms and routers under sequence parallelism, are not. All
experts are assumed to get as many tokens.
"""

from collections import Counter
from dataclasses import astuple, dataclass

from neo_megatron.model.config import NeoSizes
from neo_megatron.model.context_parallel_cost import default_way, sent_bytes
from neo_megatron.planning.activations import layers_by_kind, rank_tokens, repeats_keys
from neo_megatron.planning.flops import trains_new_parts_only
from neo_megatron.planning.layout import Chunk, Layout
from neo_megatron.planning.parameters import chunk_parameters
from neo_megatron.planning.state import MAIN_GRADIENT, divided_state, fully_sharded_elements
from neo_megatron.planning.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in one step.

    Attributes:
        tensor: all-reduces of a layer's outputs and input gradients, or all-gathers and reduce-scatters under
            sequence parallelism; and the same of the tokens of experts, over the ranks that share an expert.
        experts: all-to-alls of tokens to their experts and back.
        context: all-to-alls, or gathers of keys and values.
        pipeline: hidden states to the next stage, their gradients to the one before.
        gradients: reduce-scatter or all-reduce over the ranks with the same parameters; of experts, which may be on
            fewer, and all others.
        parameters: all-gather after the step of the distributed optimizer; with parameters sharded by Megatron-FSDP,
            of each layer in every forward and backward.
        embedding: all-reduce between the two copies of a tied embedding.
    """

    tensor: float
    context: float
    experts: float
    pipeline: float
    gradients: float
    parameters: float
    embedding: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def rank_traffic(
    sizes: NeoSizes, layout: Layout, workload: Workload, training_stage: int, pipeline_rank: int
) -> Traffic:
    """Bytes that a rank of one pipeline stage sends in a step."""
    chunks = layout.alike_chunks(sizes)[pipeline_rank]
    per_micro_batch = [
        (
            count * _tensor_parallel(sizes, layout, workload, chunk, training_stage),
            count * _context_parallel(sizes, layout, workload, chunk),
            count * _expert_parallel(sizes, layout, workload, chunk),
            count * _pipeline(sizes, layout, workload, chunk),
        )
        for chunk, count in Counter(chunks).items()
    ]
    tensor, context, experts, pipeline = (
        layout.micro_batches * sum(kind) for kind in zip(*per_micro_batch, strict=True)
    )
    if layout.use_megatron_fsdp:
        gradients, parameters = _fully_sharded(sizes, layout, training_stage)
    else:
        gradients, parameters = _data_parallel(sizes, layout, training_stage, pipeline_rank)
    embedding = 4.0 * sum(
        parameter.total
        for chunk in chunks
        if chunk.embedding or chunk.head
        for parameter in chunk_parameters(sizes, layout, chunk, training_stage)
        if parameter.shared_embedding and parameter.trained
    )
    return Traffic(tensor, context, experts, pipeline, gradients, parameters, embedding)


def _data_parallel(sizes: NeoSizes, layout: Layout, training_stage: int, pipeline_rank: int) -> tuple[float, float]:
    """Bytes of gradients, and of parameters."""
    states = divided_state(sizes, layout, training_stage, pipeline_rank)
    elements = sum(
        state.buffer_elements * (ranks - 1) / ranks
        for state, ranks in zip(states, (layout.state_ranks, layout.expert_state_ranks), strict=True)
    )
    if layout.use_distributed_optimizer:
        return elements * MAIN_GRADIENT, elements * layout.parameter_bytes
    return 2 * elements * MAIN_GRADIENT, 0.0


def _fully_sharded(sizes: NeoSizes, layout: Layout, training_stage: int) -> tuple[float, float]:
    """The same of Megatron-FSDP, which also gathers frozen parameters.

    Shards of gradients are summed over micro-batches; without them, complete gradients are, and reduced once.
    """
    elements = fully_sharded_elements(sizes, layout, training_stage)
    share = (layout.state_ranks - 1) / layout.state_ranks
    reduced = elements.trained * (layout.micro_batches if layout.shards_gradients else 1)
    gathered = elements.others + elements.layers * (2 * layout.micro_batches if layout.shards_parameters else 1)
    return share * reduced * MAIN_GRADIENT, share * gathered * layout.parameter_bytes


def layer_collectives(sizes: NeoSizes, layout: Layout, frozen: bool, recomputed: bool) -> int:
    """All-gathers and reduce-scatters of one layer's hidden states in forward and backward; an all-reduce is two.

    Forward: the inputs of attention and of `linear_fc1`, the outputs of `linear_proj` and `linear_fc2`. Backward: the
    same four the other way; under sequence parallelism the input of attention and that of a trained `linear_fc1` are
    gathered once more. Experts, which need sequence parallelism, exchange tokens in place of the two of the SwiGLU.
    """
    if sizes.num_experts:
        forward, mlp, backward = 2, 0, 2 + 1
    elif layout.sequence_parallel:
        forward, mlp, backward = 4, 2, 4 + 1 + (not frozen)
    else:
        forward, mlp, backward = 2 * 2, 2, 2 * 2
    again = forward if recomputed else mlp * layout.recomputes_mlp
    return forward + backward + again


def _tensor_parallel(sizes: NeoSizes, layout: Layout, workload: Workload, chunk: Chunk, training_stage: int) -> float:
    ranks = layout.tensor_model_parallel_size
    x, _ = rank_tokens(layout, workload)
    hidden_states = x * sizes.hidden_size * layout.parameter_bytes * (ranks - 1) / ranks
    count = 0
    for frozen, numbers in layers_by_kind(sizes, chunk, training_stage):
        again = layout.recomputed_layers(numbers)
        count += again * layer_collectives(sizes, layout, frozen, recomputed=True)
        count += (len(numbers) - again) * layer_collectives(sizes, layout, frozen, recomputed=False)
    if chunk.embedding:
        # An all-reduce of the output; or a reduce-scatter, and a gather of the gradient unless it is frozen.
        count += 1 if layout.sequence_parallel and trains_new_parts_only(training_stage) else 2
    if chunk.head:
        count += 2
    sent = count * hidden_states
    if sizes.num_experts:
        # Inputs of experts are gathered, their outputs summed in the float32 of the router.
        ranks = layout.expert_tensor_ranks
        token = _token_to_expert(sizes, layout) + sizes.hidden_size * 4
        sent += _exchanges(layout, chunk) * _tokens_of_experts(sizes, layout, workload) * (ranks - 1) * token
    return sent


def _expert_parallel(sizes: NeoSizes, layout: Layout, workload: Workload, chunk: Chunk) -> float:
    if not sizes.num_experts:
        return 0.0
    ranks = layout.expert_model_parallel_size
    token = _token_to_expert(sizes, layout) + sizes.hidden_size * layout.parameter_bytes
    return _exchanges(layout, chunk) * _tokens_of_experts(sizes, layout, workload) * (ranks - 1) / ranks * token


def _exchanges(layout: Layout, chunk: Chunk) -> int:
    """How often tokens of a micro-batch go to experts and back: forward, backward, and again where recomputed."""
    again = chunk.layers if layout.recomputes_mlp else layout.recomputed_layers(range(chunk.layers))
    return 2 * chunk.layers + again


def _tokens_of_experts(sizes: NeoSizes, layout: Layout, workload: Workload) -> float:
    """Tokens that a rank sends to experts, a token once for each of its own."""
    return rank_tokens(layout, workload)[1] * sizes.experts_per_token


def _token_to_expert(sizes: NeoSizes, layout: Layout) -> int:
    """Bytes of a token on its way to an expert: hidden states, and its weight in float32."""
    return sizes.hidden_size * layout.parameter_bytes + 4


def _context_parallel(sizes: NeoSizes, layout: Layout, workload: Workload, chunk: Chunk) -> float:
    if layout.context_parallel_size == 1:
        return 0.0
    x, _ = rank_tokens(layout, workload)
    tensor = layout.tensor_model_parallel_size
    heads, groups = sizes.num_attention_heads // tensor, sizes.num_query_groups // tensor
    ranks = layout.context_parallel_size
    way = layout.cp_comm_type or default_way(heads, groups, ranks)
    forward, backward = sent_bytes(way, int(x), heads, groups, sizes.attention_widths, ranks, layout.parameter_bytes)
    if way == "allgather" and repeats_keys(sizes, layout) and not layout.recomputes("core_attn"):
        backward -= forward  # the kernel has copies of what would be gathered once more
    again = chunk.layers if layout.recomputes("core_attn") else layout.recomputed_layers(range(chunk.layers))
    return chunk.layers * (forward + backward) + again * forward


def _pipeline(sizes: NeoSizes, layout: Layout, workload: Workload, chunk: Chunk) -> float:
    """Every chunk but the last sends hidden states on, every one but the first a gradient back."""
    _, y = rank_tokens(layout, workload)
    if layout.pipeline_model_parallel_size == 1:
        return 0.0
    return ((not chunk.head) + (not chunk.embedding)) * y * sizes.hidden_size * layout.parameter_bytes
