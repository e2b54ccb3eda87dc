"""Specs of the modules of a decoder layer: Megatron's own (`local`) or Transformer Engine's.

Both specs give the same parameter shapes and, in a distributed checkpoint, the same names.
"""

from collections.abc import Callable
from functools import partial

from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from neo_megatron.model.expert_router import ExpertLayer, ExpertRouter
from neo_megatron.model.native_attention import (
    InHeadSelfAttention,
    NativeSelfAttention,
    NativeSelfAttentionSubmodules,
    SeparateSelfAttention,
)
from neo_megatron.model.recomputed_mlp import RecomputedMLP
from neo_megatron.model.rms_norm import RMSNorm
from neo_megatron.model.shared_input_linear import (
    SharedInputColumnParallelLinear,
    TENormColumnParallelLinear,
    TESharedInputColumnParallelLinear,
)
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.packages import install


def decoder_spec(
    config: NeoConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, for `config.transformer_impl`.

    Raises:
        ModuleNotFoundError: Transformer Engine is asked for and not installed.
    """
    if config.transformer_impl == "local":
        layer, norm = local_layer_spec(config), RMSNorm
    else:
        layer, norm = transformer_engine_layer_spec(config), TENorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


# Each form of `attention_forms.py`.
_ATTENTION: dict[str, type[NativeSelfAttention]] = {"separate": SeparateSelfAttention, "in-head": InHeadSelfAttention}


def local_layer_spec(config: NeoConfig) -> ModuleSpec:
    """Megatron's tensor-parallel linear layers and PyTorch's RMSNorm: runs everywhere."""
    if config.sizes.attention_form == "separate":
        attention = NativeSelfAttentionSubmodules(
            linear_qkv=SharedInputColumnParallelLinear,
            linear_qk_hw=SharedInputColumnParallelLinear,
            linear_proj=RowParallelLinear,
        )
    else:
        attention = NativeSelfAttentionSubmodules(linear_qkv=ColumnParallelLinear, linear_proj=RowParallelLinear)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if config.num_moe_experts:
        mlp = _experts(partial(SequentialMLP, submodules=submodules))
    else:
        mlp = _dense(config, submodules)
    return _layer_spec(config, attention, mlp, input_norm=RMSNorm, pre_mlp_norm=RMSNorm)


def transformer_engine_layer_spec(config: NeoConfig) -> ModuleSpec:
    """Transformer Engine's linear layers (FP8) and norms; attention stays NEO's own, no TE kernel has its mask.

    The norm of the attention's input is part of `linear_qkv`, except where `shared_input_linear.py` says why not.
    """
    if not HAVE_TE:
        raise ModuleNotFoundError(
            "--transformer-impl transformer_engine needs Transformer Engine: "
            f"{install('transformer_engine')}, or choose --transformer-impl local"
        )
    fused_norm = True
    attention = NativeSelfAttentionSubmodules(
        linear_qkv=TELayerNormColumnParallelLinear, linear_proj=TERowParallelLinear
    )
    if config.sizes.attention_form == "separate":
        fused_norm = config.tensor_model_parallel_size == 1
        attention = NativeSelfAttentionSubmodules(
            linear_qkv=TENormColumnParallelLinear if fused_norm else TESharedInputColumnParallelLinear,
            linear_qk_hw=TESharedInputColumnParallelLinear,
            linear_proj=TERowParallelLinear,
        )
    if config.num_moe_experts:
        mlp = _experts(TESpecProvider().grouped_mlp_modules(True))
    else:
        submodules = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
        mlp = _dense(config, submodules)
    return _layer_spec(
        config,
        attention,
        mlp,
        input_norm=IdentityOp if fused_norm else TENorm,
        pre_mlp_norm=TENorm if config.num_moe_experts else IdentityOp,
    )


def _dense(config: NeoConfig, submodules: MLPSubmodules) -> Callable:
    mlp = RecomputedMLP if config.recomputes("mlp_act") else MLP
    return partial(mlp.as_mlp_submodule, submodules=submodules)


def _experts(experts: Callable) -> Callable:
    """Megatron's layer of experts, without shared ones."""
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=ExpertRouter))


def _layer_spec(
    config: NeoConfig,
    attention: NativeSelfAttentionSubmodules,
    mlp: Callable,
    input_norm: type,
    pre_mlp_norm: type,
) -> ModuleSpec:
    # Norms are stored under the names of Megatron's fused layers, as its GPT models store them; a router has no norm.
    stored_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not config.num_moe_experts:
        stored_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=ExpertLayer if config.num_moe_experts else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=ModuleSpec(module=_ATTENTION[config.sizes.attention_form], submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=stored_names,
        ),
    )
