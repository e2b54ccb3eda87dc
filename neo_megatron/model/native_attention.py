"""Native self-attention: every query and key head has channels for t, h and w, each rotated by its own position.

    query = [q_t | q_h | q_w],  key = [k_t | k_h | k_w]  (X wide),  value (D wide),  softmax scale 1/sqrt(D)

Where these channels come from is the form, see `attention_forms.py`: a class for each.

Shape suffixes: S sequence, B packs, G key-value heads of this rank, R query heads per key-value head, X channels of
queries and keys, D of values.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import divide
from torch import Tensor

from neo_megatron.model import qkv_prepare
from neo_megatron.model.context_parallel import CoreAttention, context_parallel_attention
from neo_megatron.model.core_attention import AttentionMask, attend
from neo_megatron.model.expert_router import Tokens
from neo_megatron.model.image_attention import MeasuredRows
from neo_megatron.model.native_rope import NativeRotary
from neo_megatron.model.rms_norm import HeadNorm
from neo_megatron.model.shared_input_linear import gather_again, keeps_input, share_input
from neo_megatron.model.transformer_config import NeoConfig

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PackContext:
    """Properties of the packs of a micro-batch that every layer needs; they travel in Megatron's `packed_seq_params`.

    (That argument reaches the layers unchanged, under activation recomputation too, where tensors alone may be
    arguments.)
    """

    rotary: NativeRotary
    mask: AttentionMask
    key_order: Tensor | None = None
    """See `context_parallel_attention`."""
    tokens: Tokens | None = None
    """For the routers of experts."""
    measured: MeasuredRows | None = None
    """Rows whose attention to image tokens is measured."""


@dataclass
class NativeSelfAttentionSubmodules:
    """The modules that the local and the Transformer Engine specs choose between; not every form has `linear_qk_hw`."""

    linear_qkv: type
    linear_proj: type
    linear_qk_hw: type | None = None


class NativeSelfAttention(MegatronModule, ABC):
    """Self-attention over ``[S, B, H]`` with tensor-parallel heads, of either form.

    `linear_qkv` keeps Megatron's layout: per key-value head its R query heads, then the key, then the value.

    Attributes:
        image_attention: sums of `MeasuredRows.share_of_images` since it was last ``None``.
    """

    image_attention: Tensor | None = None

    def __init__(
        self,
        config: NeoConfig,
        submodules: NativeSelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        """Ignores `cp_comm_type`, which Megatron's layer passes: the inputs were already split for one way."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tensor_parallel_group = pg_collection.tp
        self.context_parallel_group = pg_collection.cp
        self.head_dim = config.kv_channels
        self.groups_per_rank = divide(config.num_query_groups, pg_collection.tp.size())
        self.heads_per_group = divide(config.num_attention_heads, config.num_query_groups)
        # As in megatron.core.transformer.attention: only the core attention is recomputed.
        self.recompute_core_attention = config.recomputes("core_attn")
        self.recompute_heads = config.recomputes("qkv_heads")
        self.linear_qkv = self._column_parallel(submodules.linear_qkv, self.heads_per_group + 2)
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )

    def _column_parallel(self, module: type | None, heads_per_group: int) -> Any:
        """A projection of the hidden states to so many heads of D channels for every key-value head."""
        config = self.config
        return build_module(
            module,
            config.hidden_size,
            config.num_query_groups * heads_per_group * self.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tensor_parallel_group,
        )

    def _norm(self, width: int) -> HeadNorm:
        # Megatron sums the gradients of everything named q_layernorm* and k_layernorm* over the tensor-parallel group.
        return HeadNorm(self.config, width, self.config.layernorm_epsilon)

    def forward(self, hidden_SBH: Tensor, *, packed_seq_params: PackContext, **_unused) -> tuple[Tensor, None]:
        """``[S, B, H]`` -> ``[S, B, H]`` and no bias; S is this rank's part if the sequence is split."""
        packs = packed_seq_params
        core = partial(attend, mask=packs.mask, scale=1 / sqrt(self.head_dim))
        if self.recompute_core_attention and self.training:
            core = partial(tensor_parallel.checkpoint, core, False)
        if packs.measured is not None:
            core = partial(self._measure, packs.measured, core)
        shared = self.input_of_products(hidden_SBH)
        heads = CheckpointWithoutOutput(self.config.fp8) if self.recompute_heads and self.training else None
        query, key, value = self.query_key_value(shared, packs.rotary, heads)
        context = context_parallel_attention(core, query, key, value, self.context_parallel_group, packs.key_order)
        if heads is not None and context.requires_grad:
            heads.discard_output_and_register_recompute(context)
        self.free_until_backward(shared, hidden_SBH, context, query)
        return self.linear_proj(context)

    def _measure(
        self, measured: MeasuredRows, core: CoreAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        share = measured.share_of_images(query, key, 1 / sqrt(self.head_dim))
        self.image_attention = share if self.image_attention is None else self.image_attention + share
        return core(query, key, value)

    def set_for_recompute_input_layernorm(self) -> None:
        """Does nothing; Megatron calls it under FP8. `TESharedInputColumnParallelLinear` keeps the norm's output."""

    def input_of_products(self, hidden_SBH: Tensor) -> Tensor:
        """The tensor that `query_key_value` takes."""
        return hidden_SBH

    def free_until_backward(self, shared: Tensor, hidden_SBH: Tensor, context: Tensor, query: Tensor) -> None:
        """May free what `input_of_products` made, until the backward needs it."""

    @abstractmethod
    def query_key_value(
        self, shared: Tensor, rotary: NativeRotary, heads: CheckpointWithoutOutput | None
    ) -> QueryKeyValue:
        """``[S, B, G * R, X]``, ``[S, B, G, X]`` and ``[S, B, G, D]``, normalised and rotated.

        Args:
            heads: computes them, so that they can be discarded; ``None`` where they are kept.
        """

    def _prepared(
        self,
        projections: list[Tensor],
        query_norms: list[HeadNorm],
        key_norms: list[HeadNorm],
        rotary: NativeRotary,
        heads: CheckpointWithoutOutput | None,
    ) -> QueryKeyValue:
        shape = self.groups_per_rank, -1, self.head_dim
        inputs = (
            [projection.unflatten(-1, shape) for projection in projections],
            [norm() for norm in query_norms],
            [norm() for norm in key_norms],
        )
        first, second = len(projections), len(projections) + len(query_norms)

        def prepare(*tensors: Tensor) -> QueryKeyValue:
            parts = tensors[:first], tensors[first:second], tensors[second:]
            query, key, value = qkv_prepare.query_key_value(*parts, rotary, self.config.layernorm_epsilon)
            # Values may be a part of the projection, which must not be discarded.
            return query, key, value if heads is None else value.clone()

        tensors = sum(inputs, [])
        return prepare(*tensors) if heads is None else heads.checkpoint(prepare, *tensors)


class SeparateSelfAttention(NativeSelfAttention):
    """The form ``separate``: with h = w = 0 and zero keys for them the layer is Qwen3's.

    `linear_qk_hw` is laid out as `linear_qkv` is: per key-value head R query heads, then the key, each [h half | w
    half]. It is a matrix of its own because stage 1 trains it in the post-LLM while `linear_qkv` is frozen.
    """

    def __init__(self, config: NeoConfig, submodules: NativeSelfAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.gather_again = config.sequence_parallel and keeps_input(config)
        self.linear_qk_hw = self._column_parallel(submodules.linear_qk_hw, self.heads_per_group + 1)
        # Megatron's Muon orthogonalizes queries and keys apart, and knows of `linear_qkv` alone.
        self.linear_qk_hw.weight.is_qkv = True
        self.linear_qk_hw.weight.qkv_split_shapes = [self.heads_per_group * self.head_dim, self.head_dim]
        for_t, for_h, for_w = config.sizes.axis_widths
        self.q_layernorm, self.k_layernorm = self._norm(for_t), self._norm(for_t)
        self.q_layernorm_h, self.k_layernorm_h = self._norm(for_h), self._norm(for_h)
        self.q_layernorm_w, self.k_layernorm_w = self._norm(for_w), self._norm(for_w)

    def input_of_products(self, hidden_SBH: Tensor) -> Tensor:
        return share_input(hidden_SBH, self.tensor_parallel_group, self.config.sequence_parallel)

    def free_until_backward(self, shared: Tensor, hidden_SBH: Tensor, context: Tensor, query: Tensor) -> None:
        if self.gather_again:
            gather_again(shared, hidden_SBH, self.tensor_parallel_group, context, query)

    def query_key_value(
        self, shared: Tensor, rotary: NativeRotary, heads: CheckpointWithoutOutput | None
    ) -> QueryKeyValue:
        qkv, normalised = self.linear_qkv(shared)  # the input normalised by a fused norm, otherwise no bias
        qk_hw, _ = self.linear_qk_hw(shared if normalised is None else normalised)
        return self._prepared(
            [qkv, qk_hw],
            [self.q_layernorm, self.q_layernorm_h, self.q_layernorm_w],
            [self.k_layernorm, self.k_layernorm_h, self.k_layernorm_w],
            rotary,
            heads,
        )


class InHeadSelfAttention(NativeSelfAttention):
    """The form ``in-head``: one product, whose heads have their channels shared out to t, h and w."""

    def __init__(self, config: NeoConfig, submodules: NativeSelfAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        for_t, for_h, for_w = config.sizes.axis_widths
        self.q_layernorm, self.k_layernorm = self._norm(for_t), self._norm(for_t)
        self.q_layernorm_hw, self.k_layernorm_hw = self._norm(for_h + for_w), self._norm(for_h + for_w)

    def query_key_value(
        self, shared: Tensor, rotary: NativeRotary, heads: CheckpointWithoutOutput | None
    ) -> QueryKeyValue:
        qkv, _ = self.linear_qkv(shared)
        return self._prepared(
            [qkv], [self.q_layernorm, self.q_layernorm_hw], [self.k_layernorm, self.k_layernorm_hw], rotary, heads
        )
