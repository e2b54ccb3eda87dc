"""Native self-attention: Qwen3's attention over t, with channels for h and w next to it in every query and key head.

    query = [q_t | q_h | q_w],  key = [k_t | k_h | k_w]  (2 * head_dim wide),  value (head_dim wide)

each part with a norm and a rotary axis of its own; softmax scale 1/sqrt(head_dim), so that with h = w = 0 and
W_k_hw = 0 the layer is Qwen3's. Source: NEO (arXiv 2510.14979), section 3.1.

Shape suffixes: S sequence, B packs, G key-value heads of this rank, R query heads per key-value head, D head dimension.
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import divide
from torch import Tensor

from neo_megatron.model import qkv_prepare
from neo_megatron.model.context_parallel import context_parallel_attention
from neo_megatron.model.core_attention import AttentionMask, attend
from neo_megatron.model.native_rope import NativeRotary
from neo_megatron.model.rms_norm import HeadNorm
from neo_megatron.model.shared_input_linear import gather_again, keeps_input, share_input
from neo_megatron.model.transformer_config import NeoConfig


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


@dataclass
class NativeSelfAttentionSubmodules:
    """The modules that the local and the Transformer Engine specs choose between."""

    linear_qkv: type
    linear_qk_hw: type
    linear_proj: type


class NativeSelfAttention(MegatronModule):
    """Self-attention over ``[S, B, H]`` with tensor-parallel heads.

    `linear_qkv` keeps Megatron's layout: per key-value head its R query heads, then the key, then the value.
    `linear_qk_hw` is laid out alike: per key-value head R query heads, then the key, each [h half | w half]. It is a
    matrix of its own because stage 1 trains it in the post-LLM while `linear_qkv` is frozen.
    """

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
        self.recompute_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

        self.gather_again = config.sequence_parallel and keeps_input(config)

        def column_parallel(module: type, heads: int, buffer_name: str):
            return build_module(
                module,
                config.hidden_size,
                config.num_query_groups * heads * self.head_dim,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name=buffer_name,
                tp_group=pg_collection.tp,
            )

        self.linear_qkv = column_parallel(submodules.linear_qkv, self.heads_per_group + 2, "qkv")
        self.linear_qk_hw = column_parallel(submodules.linear_qk_hw, self.heads_per_group + 1, "qkv")
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

        def norm(width: int) -> HeadNorm:
            return HeadNorm(config, width, config.layernorm_epsilon)

        # Megatron sums the gradients of everything named q_layernorm* and k_layernorm* over the tensor-parallel group.
        self.q_layernorm, self.k_layernorm = norm(self.head_dim), norm(self.head_dim)
        self.q_layernorm_h, self.k_layernorm_h = norm(self.head_dim // 2), norm(self.head_dim // 2)
        self.q_layernorm_w, self.k_layernorm_w = norm(self.head_dim // 2), norm(self.head_dim // 2)

    def forward(self, hidden_SBH: Tensor, *, packed_seq_params: PackContext, **_unused) -> tuple[Tensor, None]:
        """``[S, B, H]`` -> ``[S, B, H]`` and no bias; S is this rank's part if the sequence is split."""
        packs = packed_seq_params
        core = partial(attend, mask=packs.mask, scale=1 / sqrt(self.head_dim))
        if self.recompute_core_attention and self.training:
            core = partial(tensor_parallel.checkpoint, core, False)
        shared = share_input(hidden_SBH, self.tensor_parallel_group, self.config.sequence_parallel)
        query, key, value = self.query_key_value(shared, packs.rotary)
        context = context_parallel_attention(core, query, key, value, self.context_parallel_group, packs.key_order)
        if self.gather_again:
            gather_again(shared, hidden_SBH, self.tensor_parallel_group, context, query)
        return self.linear_proj(context)

    def set_for_recompute_input_layernorm(self) -> None:
        """Does nothing; Megatron calls it under FP8. `TESharedInputColumnParallelLinear` keeps the norm's output."""

    def query_key_value(self, shared: Tensor, rotary: NativeRotary) -> tuple[Tensor, Tensor, Tensor]:
        """``[S, B, G * R, 2D]``, ``[S, B, G, 2D]`` and ``[S, B, G, D]``, normalised and rotated."""
        heads = self.heads_per_group
        qkv, normalised = self.linear_qkv(shared)  # the input normalised by a fused norm, otherwise no bias
        qk_hw, _ = self.linear_qk_hw(shared if normalised is None else normalised)
        qkv = qkv.unflatten(-1, (self.groups_per_rank, heads + 2, self.head_dim))
        qk_hw = qk_hw.unflatten(-1, (self.groups_per_rank, heads + 1, self.head_dim))
        return qkv_prepare.query_key_value(
            qkv,
            qk_hw,
            [norm() for norm in (self.q_layernorm, self.q_layernorm_h, self.q_layernorm_w)],
            [norm() for norm in (self.k_layernorm, self.k_layernorm_h, self.k_layernorm_w)],
            rotary,
            self.config.layernorm_epsilon,
        )
