"""Floating-point operations of NEO's parts, forward and backward, given what the training stage freezes.

Counted are matrix products, two operations for a multiply-add; norms, rotary, softmax and the optimizer are not. A
product with a weight costs as much again for the gradient of its input and for the gradient of the weight. A frozen
weight has no gradient, and where nothing before it trains, its input needs none. Of experts only those that a token
goes to are counted; the figures that a router collects for the log are not.

Shapes: H hidden size, F FFN width, N query heads, G key-value heads, X channels of queries and keys, D of values, E
channels of the patch embedding, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cache

from neo_megatron.checkpoint.names import TensorRow, tensor_table
from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.workload import Workload

ROUTER = ".mlp.router.weight"


@dataclass(frozen=True)
class Flops:
    """Operations of a part: `forward`, `backward`, and what the attention kernel computes again in its backward."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """Operations that the training step needs, however it is computed: MFU is counted from these."""
        return self.forward + self.backward

    @property
    def training(self) -> float:
        """Operations that a step computes without activation recomputation, which adds `forward` once more."""
        return self.model + self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.forward * times, self.backward * times, self.recomputed * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class ModelFlops:
    """Operations of each part for one token of the mean pack; a layer's are those of one layer."""

    patch_embedding: Flops
    pre_buffer_layer: Flops
    post_llm_layer: Flops
    head: Flops

    def total(self, sizes: NeoSizes) -> Flops:
        layers = sizes.pre_buffer_layers * self.pre_buffer_layer + sizes.post_llm_layers * self.post_llm_layer
        return self.patch_embedding + layers + self.head


def model_flops(sizes: NeoSizes, training_stage: int, workload: Workload) -> ModelFlops:
    """The operations of every part for one token of the mean pack: images and trained positions by their shares."""
    return ModelFlops(
        patch_embedding=workload.image_share * patch_embedding_flops(sizes),
        pre_buffer_layer=layer_flops(sizes, workload.mean_keys, frozen=False),
        post_llm_layer=layer_flops(sizes, workload.mean_keys, frozen=trains_new_parts_only(training_stage)),
        head=workload.trained_share * head_flops(sizes, frozen=trains_new_parts_only(training_stage)),
    )


def trains_new_parts_only(training_stage: int) -> bool:
    """Whether the post-LLM (but for parts of its attention), the word embeddings and the head are frozen."""
    if training_stage not in (1, 2, 3):
        raise ConfigError(f"--training-stage {training_stage}: stages are 1, 2 and 3")
    return training_stage == 1


def layer_flops(sizes: NeoSizes, mean_keys: float, frozen: bool = False) -> Flops:
    """A decoder layer for one token; `frozen` leaves only those parts of its attention to train that stage 1 trains.

    The input of a layer always needs a gradient: the patch embedding in front of it trains in every stage.
    """
    return layer_products(sizes, frozen) + attention_core_flops(sizes, mean_keys)


@cache
def layer_products(sizes: NeoSizes, frozen: bool = False) -> Flops:
    """The layer's products with weights: q, k, v, the output projection, and SwiGLU or router and experts."""
    rows = [row for row in tensor_table(sizes) if row.layer == sizes.num_layers - 1 and len(row.megatron_shape) > 1]
    return sum(
        (
            _product(
                _weights_at_work(row, sizes),
                # Megatron's router computes the gradient of its weight, frozen or not.
                trained=not frozen or row.trained_in_stage_1 or row.megatron.endswith(ROUTER),
            )
            for row in rows
        ),
        Flops(),
    )


def mlp_products(sizes: NeoSizes, frozen: bool = False) -> Flops:
    """Those of them that are the SwiGLU's, or those of the router and the experts of one token."""
    if not sizes.num_experts:
        return _product(3 * sizes.hidden_size * sizes.ffn_hidden_size, trained=not frozen)
    return _product(sizes.num_experts * sizes.hidden_size) + expert_products(sizes, frozen)


def expert_products(sizes: NeoSizes, frozen: bool = False) -> Flops:
    """Those of the experts of one token; none of a dense model."""
    return _product(sizes.experts_per_token * expert_weights(sizes), trained=not frozen)


def expert_weights(sizes: NeoSizes) -> int:
    """Weights of one expert."""
    return 3 * sizes.hidden_size * sizes.expert_ffn_hidden_size


def _weights_at_work(row: TensorRow, sizes: NeoSizes) -> int:
    """Weights that one token is multiplied with: of experts those of its own."""
    weights = math.prod(row.megatron_shape)
    return weights // sizes.num_experts * sizes.experts_per_token if row.expert else weights


def attention_core_flops(sizes: NeoSizes, mean_keys: float) -> Flops:
    """Softmax attention of one query: scores over X channels, values of D, over the keys that it may see.

    It has no weights; both products have two inputs that need gradients. FlexAttention keeps no score matrix, and its
    backward has two loops, one for the gradients of queries and one for those of keys and values: both compute the
    scores again, and both the gradients of the weights, which are a product of values. (Its template in PyTorch 2.11,
    `flex_backwards.py.jinja`, has these seven products.)
    """
    scores, values = (2 * sizes.num_attention_heads * width * mean_keys for width in sizes.attention_widths)
    return Flops(forward=scores + values, backward=2 * (scores + values), recomputed=2 * scores + values)


def patch_embedding_flops(sizes: NeoSizes) -> Flops:
    """Both projections for one image token; pixels need no gradient."""
    patches, width = sizes.merge_size**2, sizes.patch_embedding_size
    pixels = patches * 3 * sizes.patch_size**2 * width
    return _product(pixels, input_gradient=False) + _product(patches * width * sizes.hidden_size)


def head_flops(sizes: NeoSizes, frozen: bool = False) -> Flops:
    """The head for one trained position."""
    return _product(sizes.hidden_size * sizes.vocab_size, trained=not frozen)


def _product(weights: int, trained: bool = True, input_gradient: bool = True) -> Flops:
    """One row times a matrix of so many weights."""
    return Flops(forward=2 * weights, backward=2 * weights * (trained + input_gradient))
