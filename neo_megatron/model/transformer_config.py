"""NEO's `TransformerConfig`: Megatron's, with the sizes that only NEO has and the settings that make a layer NEO's."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from neo_megatron.errors import ConfigError
from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.model.config import ELEMENTWISE, NeoSizes


@dataclass
class NeoConfig(TransformerConfig):
    """Built from Megatron's arguments by `core_transformer_config_from_args(args, NeoConfig)`.

    Raises:
        ConfigError: the tensor-parallel size does not divide heads or vocabulary.
    """

    neo_sizes: dict[str, Any] = field(default_factory=dict)
    """`dataclasses.asdict` of the `NeoSizes`; a plain dict, because arguments are stored in checkpoints."""

    balance_loss_coeff: float = 0.0
    """Of the loss in `expert_router.py`, in addition to the cross entropy."""

    attention_kernel_options: dict[str, int] | None = None
    """Of FlexAttention on a GPU; by default `flex_kernel.kernel_options`."""

    normalization: str = "RMSNorm"
    activation_func: Callable = silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    qk_layernorm: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    recompute_modules: list[str] | None = None
    """Of Megatron and `ELEMENTWISE`."""

    batch_p2p_sync: bool = False
    """Megatron's default lets the host wait for the device after every message of a pipeline: for PyTorch before 2."""

    # FP8 with delayed scaling. The maxima of all data-parallel ranks together would make them wait for one another in
    # every micro-batch; a long history is Transformer Engine's own default.
    tp_only_amax_red: bool = True
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: str = "max"

    @classmethod
    def from_sizes(cls, sizes: NeoSizes, **settings: Any) -> "NeoConfig":
        """A config without a command line; `settings` are fields of `TransformerConfig`: parallel sizes, dtypes, ..."""
        return cls(
            neo_sizes=asdict(sizes),
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            ffn_hidden_size=sizes.ffn_hidden_size,
            num_attention_heads=sizes.num_attention_heads,
            num_query_groups=sizes.num_query_groups,
            kv_channels=sizes.head_dim,
            layernorm_epsilon=sizes.norm_epsilon,
            **expert_settings(sizes, "num_moe_experts"),
            **settings,
        )

    def __post_init__(self) -> None:
        cpu_platform.require()
        self.sizes = NeoSizes(**self.neo_sizes)
        self._check_layout()
        # Layers are separate tensors in a checkpoint: stage 1 has optimizer state for some layers' matrices only.
        self.hetereogenous_dist_checkpoint = True
        # Loss and gradient are normalised over the global batch, see loss.py.
        self.calculate_per_token_loss = True
        if self.transformer_impl == "local":
            self.gradient_accumulation_fusion &= _apex_accumulates()
        # Megatron refuses names of modules that it does not have.
        given = self.recompute_modules or []
        own = [module for module in given if module in ELEMENTWISE]
        if own:
            self.recompute_modules = [module for module in given if module not in own]
        super().__post_init__()
        self.recompute_modules = [*(self.recompute_modules or ()), *own]
        # NEO draws all projections from one distribution; Megatron would narrow the output projections by depth.
        self.output_layer_init_method = self.init_method

    def recomputes(self, module: str) -> bool:
        """Whether a module of every layer is recomputed on its own."""
        return self.recompute_granularity == "selective" and module in (self.recompute_modules or ())

    def for_megatron_layers(self) -> "NeoConfig":
        """For Megatron's own linear layers in a model whose others are Transformer Engine's.

        Transformer Engine's accumulate gradients in their products by themselves (`gradient_accumulation_fusion`),
        Megatron's need apex.
        """
        config = copy(self)
        config.gradient_accumulation_fusion &= _apex_accumulates()
        return config

    def _check_layout(self) -> None:
        counts = {
            "query heads": self.sizes.num_attention_heads,
            "key-value heads": self.sizes.num_query_groups,
            "vocabulary rows": self.sizes.vocab_size,
        }
        for sentence in tensor_parallel_refusals(self.tensor_model_parallel_size, counts):
            raise ConfigError(sentence)


def _apex_accumulates() -> bool:
    """Whether apex's kernel is installed; Megatron stops if its layers are to use it and it is missing."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def tensor_parallel_refusals(size: int, counts: dict[str, int]) -> Iterator[str]:
    """A sentence for every count that tensor parallelism splits and `size` does not divide."""
    for what, count in counts.items():
        if count % size:
            yield (
                f"--tensor-model-parallel-size {size} does not divide the {count} {what} of this model: "
                "choose a size that does"
            )


def expert_settings(sizes: NeoSizes, count: str) -> dict[str, Any]:
    """Megatron's settings for the experts of a Qwen3-MoE; ``count`` is its name of their number.

    The router computes in float32, no token is dropped. Softmax over the chosen experts alone is softmax over all of
    them, divided by the sum of the chosen. Megatron refuses it for a single one, whose weight is 1: the router divides.
    """
    if not sizes.num_experts:
        return {}
    return {
        count: sizes.num_experts,
        "moe_router_topk": sizes.experts_per_token,
        "moe_ffn_hidden_size": sizes.expert_ffn_hidden_size,
        "moe_router_pre_softmax": sizes.experts_per_token == 1 or not sizes.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }


def megatron_arguments(sizes: NeoSizes) -> dict[str, Any]:
    """The sizes under the names of Megatron's arguments, with the flags that make a Megatron decoder Qwen3's."""
    return {
        **expert_settings(sizes, "num_experts"),
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "ffn_hidden_size": sizes.ffn_hidden_size,
        "num_attention_heads": sizes.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": sizes.num_query_groups,
        "kv_channels": sizes.head_dim,
        "layernorm_epsilon": sizes.norm_epsilon,
        "max_position_embeddings": sizes.max_positions,
        "untie_embeddings_and_output_weights": not sizes.tie_word_embeddings,
        "pre_buffer_num_layers": sizes.pre_buffer_layers,
        "patch_embedding_size": sizes.patch_embedding_size,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": sizes.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "position_embedding_type": "none",
        "rotary_base": sizes.rope_theta,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,
    }


def sizes_from_arguments(args: Namespace, preset: NeoSizes) -> NeoSizes:
    """The preset with sizes replaced by Megatron's arguments, because flags win over presets."""
    return preset.replace(
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        head_dim=args.kv_channels,
        norm_epsilon=args.layernorm_epsilon,
        max_positions=args.max_position_embeddings,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        vocab_size=args.vocab_size,
        pre_buffer_layers=args.pre_buffer_num_layers,
        post_llm_layers=args.num_layers - args.pre_buffer_num_layers,
        patch_embedding_size=args.patch_embedding_size,
    )
