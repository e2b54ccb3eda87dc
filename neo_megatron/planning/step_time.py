"""Estimates step time and MFU from stated peak rates: good for comparing layouts, not as a promise."""

from dataclasses import dataclass

from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.activations import layer_activations, layers_by_kind, rank_tokens
from neo_megatron.planning.communication import Traffic, rank_traffic
from neo_megatron.planning.flops import (
    ModelFlops,
    attention_core_flops,
    expert_products,
    expert_weights,
    layer_products,
    mlp_products,
    model_flops,
)
from neo_megatron.planning.hardware import Efficiency, Gpu
from neo_megatron.planning.layout import Chunk, Layout, Precision
from neo_megatron.planning.state import MAIN_GRADIENT, MOMENTS, rank_state
from neo_megatron.planning.workload import Workload

# What a layer keeps is written and read once on the way forward, and twice, with its gradient, on the way back; run
# again, it is written and read once more. What is computed again elementwise is made of up to twice as many bytes.
MEMORY_PASSES, PASSES_AGAIN = 6, 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and what follows from them.

    Attributes:
        stages: seconds of one micro-batch, forward and backward, on each pipeline rank.
        bubble: share of the step that the slowest rank waits for the pipeline to fill and drain.
        exposed: seconds in which gradients and parameters travel and nothing is computed.
        mfu: operations that the step needs, over those that the GPUs could do meanwhile.
        tokens_per_second: per GPU.
    """

    seconds: float
    stages: list[float]
    bubble: float
    exposed: float
    mfu: float
    tokens_per_second: float
    traffic: list[Traffic]


def step_time(
    sizes: NeoSizes, layout: Layout, workload: Workload, training_stage: int, gpu: Gpu, efficiency: Efficiency
) -> StepTime:
    """The slowest rank works through all micro-batches; before and after, the others' first and last pass by.

    Seconds = m * t_max + (sum(t) - t_max) / chunks of a rank + gradient traffic that nothing hides.
    """
    flops = model_flops(sizes, training_stage, workload)
    chunks = layout.alike_chunks(sizes)
    seconds_of = {
        chunk: _chunk_seconds(sizes, layout, workload, training_stage, chunk, flops, gpu, efficiency)
        for chunk in dict.fromkeys(sum(chunks, ()))
    }
    first_alike = {rank: chunks.index(rank) for rank in chunks}
    traffic_of = {
        rank: rank_traffic(sizes, layout, workload, training_stage, number) for rank, number in first_alike.items()
    }
    traffic = [traffic_of[rank] for rank in chunks]
    stages = [
        sum(seconds_of[chunk] for chunk in rank) + _link_seconds(layout, sent, gpu, efficiency) / layout.micro_batches
        for rank, sent in zip(chunks, traffic, strict=True)
    ]
    slowest = max(stages)
    filling = (sum(stages) - slowest) / layout.virtual_pipeline_model_parallel_size
    exposed = max(
        _exposed_seconds(sizes, layout, training_stage, number, traffic[number], stages[number], gpu, efficiency)
        for number in first_alike.values()
    )
    seconds = layout.micro_batches * slowest + filling + exposed
    tokens = layout.global_batch_size * workload.sequence_length
    needed = flops.total(sizes).model * tokens
    return StepTime(
        seconds=seconds,
        stages=stages,
        bubble=filling / seconds,
        exposed=exposed,
        mfu=needed / (seconds * layout.world_size * gpu.peak(layout.precision)),
        tokens_per_second=tokens / seconds / layout.world_size,
        traffic=traffic,
    )


def layer_seconds(
    sizes: NeoSizes,
    layout: Layout,
    workload: Workload,
    frozen: bool,
    recomputed: bool,
    gpu: Gpu,
    efficiency: Efficiency,
) -> float:
    """One micro-batch through one layer, forward and backward, without communication.

    Args:
        recomputed: whether the layer is fully recomputed; single modules follow the layout.
    """
    products, core = layer_products(sizes, frozen), attention_core_flops(sizes, workload.mean_keys)
    mlp, experts = mlp_products(sizes, frozen), expert_products(sizes, frozen)
    mlp_again = recomputed or layout.recomputes_mlp
    product_count = products.training + (products.forward if recomputed else mlp.forward * mlp_again)
    expert_count = experts.training + experts.forward * mlp_again
    core_count = core.training + (core.forward if recomputed or layout.recomputes("core_attn") else 0)
    x, _ = rank_tokens(layout, workload)
    share = x / layout.tensor_model_parallel_size
    # Under FP8 only the products of the layers are in 8 bits.
    rate = gpu.peak(layout.precision) * efficiency.products
    seconds = share * (product_count - expert_count) / rate
    # Experts get few tokens each, so that their weights, and the gradients that are added up in float32, may take
    # longer through the memory than the products take.
    weights = expert_weights(sizes) * sizes.num_experts / layout.expert_model_parallel_size / layout.expert_tensor_ranks
    weights *= layout.parameter_bytes * (2 + mlp_again) + (not frozen) * 2 * MAIN_GRADIENT
    seconds += max(share * expert_count / rate, weights / (gpu.memory_rate * efficiency.memory))
    seconds += share * core_count / (gpu.peak(_without_fp8(layout)) * efficiency.attention)
    passes = MEMORY_PASSES + 2 * recomputed
    kept = layer_activations(sizes, layout, workload, frozen)
    through_memory = passes * kept.total + PASSES_AGAIN * kept.dropped_elementwise(layout)
    return seconds + through_memory / (gpu.memory_rate * efficiency.memory)


def _chunk_seconds(
    sizes: NeoSizes,
    layout: Layout,
    workload: Workload,
    training_stage: int,
    chunk: Chunk,
    flops: ModelFlops,
    gpu: Gpu,
    efficiency: Efficiency,
) -> float:
    """One micro-batch through one chunk, forward and backward, without communication."""
    seconds = 0.0
    for frozen, numbers in layers_by_kind(sizes, chunk, training_stage):
        again = layout.recomputed_layers(numbers)
        for recomputed, count in ((True, again), (False, len(numbers) - again)):
            if count:
                seconds += count * layer_seconds(sizes, layout, workload, frozen, recomputed, gpu, efficiency)
    x, y = rank_tokens(layout, workload)
    rate = gpu.peak(_without_fp8(layout)) * efficiency.products
    if chunk.embedding:  # the patch embedding is on every tensor-parallel rank, for its own part of the sequence
        seconds += y * flops.patch_embedding.training / rate
    if chunk.head:
        seconds += x * flops.head.training / layout.tensor_model_parallel_size / rate
    return seconds


def _without_fp8(layout: Layout) -> Precision:
    return "bf16" if layout.precision == "fp8" else layout.precision


def _link_seconds(layout: Layout, sent: Traffic, gpu: Gpu, efficiency: Efficiency) -> float:
    """Communication of all micro-batches, none of it hidden.

    Ranks are ordered tensor, context, data, pipeline; for experts tensor, expert, data, pipeline.
    """
    tensor = layout.tensor_model_parallel_size
    context = tensor * layout.context_parallel_size
    experts = layout.expert_tensor_ranks * layout.expert_model_parallel_size
    data = context * layout.data_parallel_size

    def rate(reach: int) -> float:
        return (gpu.link_rate if reach <= gpu.gpus_per_machine else gpu.network_rate) * efficiency.links

    # Interleaved stages send while they compute.
    exposed_pipeline = sent.pipeline if layout.virtual_pipeline_model_parallel_size == 1 else 0.0
    pipeline_reach = data * layout.pipeline_model_parallel_size
    return (
        sent.tensor / rate(max(tensor, layout.expert_tensor_ranks))
        + sent.context / rate(context)
        + sent.experts / rate(experts)
        + exposed_pipeline / rate(pipeline_reach)
    )


def _exposed_seconds(
    sizes: NeoSizes,
    layout: Layout,
    training_stage: int,
    pipeline_rank: int,
    sent: Traffic,
    micro_batch_seconds: float,
    gpu: Gpu,
    efficiency: Efficiency,
) -> float:
    """Gradients, parameters and the optimizer; overlapped traffic is hidden by the micro-batches that send it."""
    reach = layout.tensor_model_parallel_size * layout.state_ranks
    rate = (gpu.link_rate if reach <= gpu.gpus_per_machine else gpu.network_rate) * efficiency.links
    # About a third of a micro-batch is forward.
    hidden_backward = micro_batch_seconds * 2 / 3 if layout.overlap_grad_reduce else 0.0
    hidden_forward = micro_batch_seconds / 3 if layout.overlap_param_gather else 0.0
    if layout.shards_gradients:
        hidden_backward *= layout.micro_batches
    if layout.shards_parameters:
        hidden_forward = micro_batch_seconds * layout.micro_batches
    state = rank_state(sizes, layout, training_stage, pipeline_rank)
    optimizer = 2 * state.optimizer + state.optimizer / MOMENTS * 4
    return (
        max(0.0, sent.gradients / rate - hidden_backward)
        + max(0.0, sent.parameters / rate - hidden_forward)
        + sent.embedding / rate
        + optimizer / (gpu.memory_rate * efficiency.memory)
    )
