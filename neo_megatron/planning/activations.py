"""Bytes that the forward pass keeps for the backward pass, on one rank.

| kept by a layer                    | local (CPU)                          | Transformer Engine, FlexAttention (GPU)  |
|------------------------------------|--------------------------------------|------------------------------------------|
| norms                              | input, 1/rms                         | input, 1/rms; of heads only the input    |
| core attention                     | q, k, output, logsumexp; v as part   | q, k, output, logsumexp; v as part of    |
|                                    | of its projection; in 16 bits copies | its projection                           |
|                                    | of all these in float32 instead      |                                          |
| the same with                      |                                      | in addition keys and values repeated for |
| `--attention-backend flash`        |                                      | query heads, where they differ in width  |
| context parallelism                | values; and, exchanged by heads, the | the same                                 |
|                                    | output once more; not in 16 bits     |                                          |
| inputs of trained projections      | in the dtype of the model            | the same; a byte an element under FP8    |
| SwiGLU                             | its input                            | its input                                |
| router                             | its input; indices and weights       | the same                                 |
| mask, once for each micro-batch    | one of tiles                         | blocks of 128 x 128: 16 bytes each       |

Neither holds a score matrix. A frozen projection keeps no input, a frozen norm no normalised input. This table
was measured for the local kernels (`tests/planning/test_activations.py`); for the GPU in a simulation that runs all of
Megatron and Transformer Engine but the kernels (`tests/simulation`). All experts are assumed to get as many tokens.

Symbols: x tokens of this rank, y those of its sequence-parallel part, e bytes of an element.
"""

from dataclasses import dataclass

from neo_megatron.model.config import LOGIT_BYTES, NeoSizes
from neo_megatron.model.context_parallel_cost import default_way
from neo_megatron.planning.flops import trains_new_parts_only
from neo_megatron.planning.layout import Chunk, Layout
from neo_megatron.planning.workload import Workload

FLEX_BLOCK = 128


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer, grouped by what recomputation can drop."""

    hidden: float
    """Input of the layer: all that full recomputation keeps."""
    norm_outputs: float
    core_attention: float
    """Bytes that the kernel keeps in addition to its inputs and to everything that is kept anyway."""
    mlp: float
    """Of the SwiGLU; or of the router and the experts, after the norm in front of them."""
    rest: float
    heads: float = 0.0
    """Queries and keys, rotated, which the kernel keeps."""
    activation: float = 0.0
    """The output of SwiGLU, a part of `mlp`."""
    held: float = 0.0
    """Kept by Megatron's dispatcher of tokens to experts until it runs again, recomputed or not.

    That is once for a layer; it is counted with each micro-batch in flight, of whose bytes it is about a hundredth.
    """

    @property
    def total(self) -> float:
        return self.hidden + self.norm_outputs + self.core_attention + self.heads + self.mlp + self.rest + self.held

    def kept(self, layout: Layout) -> float:
        """Bytes kept of a layer that is not fully recomputed."""
        dropped = self.norm_outputs * layout.recomputes("layernorm")
        dropped += self.core_attention * layout.recomputes("core_attn")
        dropped += self.mlp * layout.recomputes_mlp
        return self.total - dropped - self.dropped_elementwise(layout)

    def dropped_elementwise(self, layout: Layout) -> float:
        """Bytes that are computed again from what is kept, without a product."""
        return self.heads * layout.recomputes("qkv_heads") + self.activation * layout.recomputes("mlp_act")


def rank_tokens(layout: Layout, workload: Workload) -> tuple[float, float]:
    """Tokens of a micro-batch on a rank: inside the tensor-parallel products, and outside them."""
    tokens = layout.micro_batch_size * workload.sequence_length / layout.context_parallel_size
    return tokens, tokens / layout.sequence_ranks


def layer_activations(sizes: NeoSizes, layout: Layout, workload: Workload, frozen: bool) -> LayerActivations:
    """Bytes that one layer keeps of one micro-batch; `frozen` as in `flops.layer_flops`."""
    kernels = _local_layer if layout.transformer_impl == "local" else _gpu_layer
    return kernels(sizes, layout, *rank_tokens(layout, workload), frozen=frozen)


def _local_layer(sizes: NeoSizes, layout: Layout, x: float, y: float, frozen: bool) -> LayerActivations:
    e, tensor, trained = layout.parameter_bytes, layout.tensor_model_parallel_size, 1 - frozen
    hidden, (width, d), norms = sizes.hidden_size, sizes.attention_widths, sizes.form.norms
    trains_output = _trains_output(sizes, frozen)
    n, g = sizes.num_attention_heads / tensor, sizes.num_query_groups / tensor
    residual = y * hidden * e
    projections = x * ((n + g) * width + g * d) * e
    query_key = x * (n + g) * width * e
    beside_inputs = x * n * d * 4 * (not trains_output)  # the output, which a trained projection keeps anyway
    if e < 4:
        beside_inputs = x * ((n + g) * width + g * d + n * d) * 4 - query_key
    exchanged = _exchanged(sizes, layout, x, trains_output) * (e == 4)
    ffn = x * sizes.ffn_hidden_size / tensor * e
    norm_inputs, mlp, activation, held = 1 + trained, ffn * (2 + trained), ffn * trained, 0.0
    if sizes.num_experts:  # a frozen router keeps its input too
        norm_inputs, (mlp, held) = 2, _experts(sizes, layout, y, trained, e)
    return LayerActivations(
        hidden=residual,
        norm_outputs=residual * norm_inputs + 2 * y * 4,
        core_attention=beside_inputs + x * n * 4,
        heads=query_key,
        mlp=mlp,
        activation=activation,
        held=held,
        rest=residual + projections + exchanged + norms * x * (n + g) * 4 + x * n * d * e * trains_output,
    )


def _gpu_layer(sizes: NeoSizes, layout: Layout, x: float, y: float, frozen: bool) -> LayerActivations:
    e, tensor, trained = layout.parameter_bytes, layout.tensor_model_parallel_size, 1 - frozen
    product_input = 1 if layout.precision == "fp8" else e
    hidden, (width, d) = sizes.hidden_size, sizes.attention_widths
    trains_output = _trains_output(sizes, frozen)
    n, g = sizes.num_attention_heads / tensor, sizes.num_query_groups / tensor
    residual = y * hidden * e
    projections = x * ((n + g) * width + g * d) * e
    query_key = x * (n + g) * width * e
    repeated = _repeated(sizes, layout, x)
    # With repeated keys `qkv_heads` drops the queries alone: the kernel holds copies of the keys.
    own_keys = x * g * width * e if repeated else 0.0
    # Attention's input is kept as it is, but for a norm that is part of `linear_qkv`: there all products quantize it
    # for themselves, a frozen one too. So they do under delayed scaling, which is not counted apart.
    fused_norm = tensor == 1 or sizes.form.products == 1
    shared = sizes.form.products * x * hidden if fused_norm and layout.precision == "fp8" else residual
    ffn = x * sizes.ffn_hidden_size / tensor
    # The second norm is part of `linear_fc1`: recomputing norms does not reach it, recomputing the MLP does. In front
    # of a router it is a module of its own.
    second_norm, held, activation = 0.0, 0.0, ffn * trained * product_input
    mlp = ffn * (2 * e + trained * product_input) + y * (hidden * product_input * trained + 4)
    if sizes.num_experts:
        second_norm, (mlp, held) = residual + y * 4, _experts(sizes, layout, y, trained, product_input)
    return LayerActivations(
        hidden=residual,
        norm_outputs=shared * (not fused_norm) + second_norm,
        core_attention=x * n * 4 + repeated,
        heads=query_key - own_keys,
        mlp=mlp,
        activation=activation,
        held=held,
        rest=residual
        + own_keys
        + shared * fused_norm
        + y * 4
        + projections
        + _exchanged(sizes, layout, x, trains_output)
        + x * n * d * e,
    )


def _exchanged(sizes: NeoSizes, layout: Layout, x: float, trains_output: bool) -> float:
    """Bytes that context parallelism keeps in addition: values, and the output as it came back.

    Without it the kernel and the output projection keep the same output; and so they do where keys are gathered.
    """
    if layout.context_parallel_size == 1:
        return 0.0
    tensor, (_, d) = layout.tensor_model_parallel_size, sizes.attention_widths
    heads, groups = sizes.num_attention_heads // tensor, sizes.num_query_groups // tensor
    way = layout.cp_comm_type or default_way(heads, groups, layout.context_parallel_size)
    return x * d * layout.parameter_bytes * (groups + heads * (way == "a2a" and trains_output))


def repeats_keys(sizes: NeoSizes, layout: Layout) -> bool:
    """Whether the kernel keeps copies of keys and values, one for each query head."""
    return layout.attention_backend == "flash" and len(set(sizes.attention_widths)) > 1


def _repeated(sizes: NeoSizes, layout: Layout, x: float) -> float:
    """Bytes of keys and values that FlashAttention 4 takes once for each query head, less those kept no longer.

    The keys as they were are freed, but under context parallelism: exchanged, they share their memory with the queries,
    and gathered, this rank's part is kept.
    """
    (width, d), tensor = sizes.attention_widths, layout.tensor_model_parallel_size
    if not repeats_keys(sizes, layout):
        return 0.0
    heads, groups = sizes.num_attention_heads // tensor, sizes.num_query_groups // tensor
    ranks, e = layout.context_parallel_size, layout.parameter_bytes
    if ranks == 1:
        return x * ((heads - groups) * width + heads * d) * e
    way = layout.cp_comm_type or default_way(heads, groups, ranks)
    return x * heads * (width + d) * e * (ranks if way == "allgather" else 1)


def _trains_output(sizes: NeoSizes, frozen: bool) -> bool:
    return not frozen or "self_attention.linear_proj.weight" in sizes.form.trained_in_stage_1


def _experts(sizes: NeoSizes, layout: Layout, y: float, trained: int, product_input: int) -> tuple[float, float]:
    """Bytes of a router and its experts: those that recomputing both drops, and those that Megatron holds on to.

    Inputs of both products of a trained expert, the input of its SwiGLU and the weights of its tokens. Of the router,
    indices and weights of the chosen experts; the order of all pairs of token and expert as int64. Held are the
    weights and the choice, for all experts, and the order of the chosen.
    """
    rows = y * sizes.experts_per_token * layout.expert_tensor_ranks
    width = sizes.expert_ffn_hidden_size / layout.expert_tensor_ranks
    experts = rows * (2 * width * layout.parameter_bytes + trained * (sizes.hidden_size + width) * product_input + 4)
    router = y * (sizes.experts_per_token * (8 + 4) + sizes.num_experts * 8)
    return experts + router, y * (sizes.experts_per_token * 8 + sizes.num_experts * (4 + 1))


def expert_tokens(sizes: NeoSizes, layout: Layout, workload: Workload) -> float:
    """Tokens of a micro-batch at the experts of a rank, a token once for each of its experts there."""
    return rank_tokens(layout, workload)[1] * sizes.experts_per_token * layout.expert_tensor_ranks


def layers_by_kind(sizes: NeoSizes, chunk: Chunk, training_stage: int) -> list[tuple[bool, range]]:
    """The layers of a chunk, numbered in it, that train and those that stage 1 has frozen: (frozen, numbers)."""
    first = chunk.pre_buffer_layers(sizes) if trains_new_parts_only(training_stage) else chunk.layers
    return [(False, range(first)), (True, range(first, chunk.layers))]


def patch_embedding_bytes(sizes: NeoSizes, layout: Layout, workload: Workload) -> float:
    """Pixels and the GELU's input, the rotated channels, float32 cosines and sines, and the image tokens themselves."""
    image_tokens = rank_tokens(layout, workload)[1] * workload.image_share
    e, patches, width = layout.parameter_bytes, sizes.merge_size**2, sizes.patch_embedding_size
    tables = patches * width * 4
    return image_tokens * (patches * (3 * sizes.patch_size**2 + 2 * width) * e + tables + sizes.hidden_size * e)


def head_bytes(sizes: NeoSizes, layout: Layout, workload: Workload, training_stage: int) -> float:
    """The final norm on all tokens; head and cross entropy on trained positions, its probabilities in float32.

    Probabilities that are too many are computed again in the backward, a chunk at a time.
    """
    x, y = rank_tokens(layout, workload)
    trained = x * workload.trained_share
    e, frozen = layout.parameter_bytes, trains_new_parts_only(training_stage)
    norm = y * (sizes.hidden_size * e + 4)
    rows = trained * sizes.hidden_size * e
    probabilities = trained * sizes.vocab_size / layout.tensor_model_parallel_size * 4
    if probabilities > LOGIT_BYTES:
        return norm + rows
    return norm + (0 if frozen else rows) + probabilities


def context_bytes(sizes: NeoSizes, layout: Layout, workload: Workload) -> float:
    """Bytes of tensors that all layers of a micro-batch share: float32 rotary tables, and the mask."""
    x, _ = rank_tokens(layout, workload)
    tables = x * sizes.query_key_dim * 4
    if layout.transformer_impl == "local":
        return tables
    return tables + x / FLEX_BLOCK * workload.sequence_length / FLEX_BLOCK * 16


def chunk_bytes(sizes: NeoSizes, layout: Layout, workload: Workload, chunk: Chunk, training_stage: int) -> float:
    """Bytes that one chunk keeps of one micro-batch between its forward and its backward."""
    e = layout.parameter_bytes
    total = context_bytes(sizes, layout, workload)
    for frozen, numbers in layers_by_kind(sizes, chunk, training_stage):
        if not numbers:
            continue
        layer = layer_activations(sizes, layout, workload, frozen)
        recomputed = layout.recomputed_layers(numbers)
        total += (len(numbers) - recomputed) * layer.kept(layout) + recomputed * layer.held
    if layout.recompute_granularity == "full":
        total += layout.checkpoints(chunk.layers) * rank_tokens(layout, workload)[1] * sizes.hidden_size * e
    if chunk.embedding:
        total += patch_embedding_bytes(sizes, layout, workload)
    if chunk.head:
        total += head_bytes(sizes, layout, workload, training_stage)
    return total
