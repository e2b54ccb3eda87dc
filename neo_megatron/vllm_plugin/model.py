"""NEO's model in vLLM's layers: keys and values go to its paged cache, positions are t, h and w.

Shape suffixes: T tokens of all requests of a step, H hidden, d channels of a head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from neo_megatron.hf.attention_neo import CosSin, rotary_cos_sin, rotate_halves
from neo_megatron.hf.tags_neo import IMAGE_TAG
from neo_megatron.hf.vision_neo import NEOVisionModel
from neo_megatron.vllm_plugin.positions import in_image, prompt_positions
from neo_megatron.vllm_plugin.processor import NEODummyInputsBuilder, NEOMultiModalProcessor, NEOProcessingInfo


class NEOAttention(nn.Module):
    """Attention of either form; see `neo_megatron.hf.attention_neo`.

    In the form `separate` queries and keys are 2d wide and values d. vLLM's cache has one width, so that values are
    padded with zeros to 2d, which takes a third more memory than 2d and d would.
    """

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config, quantisation = vllm_config.model_config.hf_text_config, vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        self.d, self.separate = config.head_dim, config.attention_form == "separate"
        self.heads, self.groups = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        H, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.qkv_proj = QKVParallelLinear(
            H,
            d,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quantisation,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * d, H, bias=False, quant_config=quantisation, prefix=f"{prefix}.o_proj"
        )
        if self.separate:
            for name, heads in (("q_proj_hw", config.num_attention_heads), ("k_proj_hw", config.num_key_value_heads)):
                layer = ColumnParallelLinear(
                    H, heads * d, bias=False, quant_config=quantisation, prefix=f"{prefix}.{name}"
                )
                self.add_module(name, layer)
            self.q_norm, self.k_norm = RMSNorm(d, eps), RMSNorm(d, eps)
            self.q_norm_h, self.q_norm_w = RMSNorm(d // 2, eps), RMSNorm(d // 2, eps)
            self.k_norm_h, self.k_norm_w = RMSNorm(d // 2, eps), RMSNorm(d // 2, eps)
        else:
            self.q_norm, self.k_norm = RMSNorm(d // 2, eps), RMSNorm(d // 2, eps)
            self.q_norm_hw, self.k_norm_hw = RMSNorm(d // 2, eps), RMSNorm(d // 2, eps)
        self.width = 2 * d if self.separate else d
        self.attn = Attention(
            self.heads,
            self.width,
            d**-0.5,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            quant_config=quantisation,
            prefix=f"{prefix}.attn",
            attn_backend=_cpu_backend(self.width) if current_platform.is_cpu() else None,
        )

    def forward(self, x_TH: Tensor, rotary: Sequence[CosSin]) -> Tensor:
        qkv, _ = self.qkv_proj(x_TH)
        heads = qkv.unflatten(-1, (-1, self.d))
        query, key, value = heads.split([self.heads, self.groups, self.groups], dim=1)
        if self.separate:
            query_hw, key_hw = (
                proj(x_TH)[0].unflatten(-1, (-1, self.d)).chunk(2, dim=-1) for proj in (self.q_proj_hw, self.k_proj_hw)
            )
            queries = self.q_norm(query), self.q_norm_h(query_hw[0]), self.q_norm_w(query_hw[1])
            keys = self.k_norm(key), self.k_norm_h(key_hw[0]), self.k_norm_w(key_hw[1])
            value = nn.functional.pad(value, (0, self.d))
        else:
            queries, keys = (
                (norm(t), *norm_hw(hw).chunk(2, dim=-1))
                for (t, hw), norm, norm_hw in (
                    (query.chunk(2, dim=-1), self.q_norm, self.q_norm_hw),
                    (key.chunk(2, dim=-1), self.k_norm, self.k_norm_hw),
                )
            )
        query, key = (
            torch.cat([rotate_halves(part, cos_sin) for part, cos_sin in zip(parts, rotary, strict=True)], dim=-1)
            for parts in (queries, keys)
        )
        context = self.attn(query.flatten(1), key.flatten(1), value.flatten(1))
        context = context.unflatten(-1, (-1, self.width))[..., : self.d]
        return self.o_proj(context.flatten(1))[0]


class NEODecoderLayer(nn.Module):
    """A decoder layer of Qwen3 or Qwen3-MoE with NEO's attention."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config, quantisation = vllm_config.model_config.hf_text_config, vllm_config.quant_config
        self.self_attn = NEOAttention(vllm_config, f"{prefix}.self_attn")
        if config.num_experts:
            self.mlp = Qwen3MoeSparseMoeBlock(vllm_config, prefix=f"{prefix}.mlp")
        else:
            self.mlp = Qwen2MLP(
                config.hidden_size, config.intermediate_size, config.hidden_act, quantisation, prefix=f"{prefix}.mlp"
            )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None, rotary: Sequence[CosSin]) -> tuple[Tensor, Tensor]:
        if residual_TH is None:
            residual_TH, x_TH = x_TH, self.input_layernorm(x_TH)
        else:
            x_TH, residual_TH = self.input_layernorm(x_TH, residual_TH)
        x_TH, residual_TH = self.post_attention_layernorm(self.self_attn(x_TH, rotary), residual_TH)
        return self.mlp(x_TH), residual_TH


class NEODecoder(nn.Module):
    """Embedding, pre-buffer and post-LLM layers (one stack), final norm."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_text_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            NEODecoderLayer(vllm_config, f"{prefix}.layers.{number}") for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TH: Tensor, positions: Tensor) -> Tensor:
        """Hidden states `[T, H]` after the final norm; ``positions [3, T]`` as `prompt_positions` has them."""
        t, h, w = positions[..., None]
        width = self.config.head_dim // (1 if self.config.attention_form == "separate" else 2)
        theta_hw = self.config.rope_theta_hw
        rotary = (
            rotary_cos_sin(t, width, self.config.rope_theta),
            rotary_cos_sin(in_image(h), width // 2, theta_hw),
            rotary_cos_sin(in_image(w), width // 2, theta_hw),
        )
        residual_TH = None
        for layer in self.layers:
            x_TH, residual_TH = layer(x_TH, residual_TH, rotary)
        return self.norm(x_TH, residual_TH)[0]


class NEOLanguageModel(nn.Module):
    """Decoder and head."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.model = NEODecoder(vllm_config, f"{prefix}.model")
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=f"{prefix}.lm_head"
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(self, x_TH: Tensor, positions: Tensor) -> Tensor:
        return self.model(x_TH, positions)

    def compute_logits(self, x_TH: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, x_TH)


@MULTIMODAL_REGISTRY.register_processor(
    NEOMultiModalProcessor, info=NEOProcessingInfo, dummy_inputs=NEODummyInputsBuilder
)
class NEOChatModel(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """NEO with its head, under the names of an exported checkpoint's tensors."""

    # With the dot, because q_proj_hw is a tensor of its own; None leaves out the generation branch of a NEO-unify.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj.": (".qkv_proj.", "q"),
            ".k_proj.": (".qkv_proj.", "k"),
            ".v_proj.": (".qkv_proj.", "v"),
            ".mlp.gate_proj.": (".mlp.gate_up_proj.", 0),
            ".mlp.up_proj.": (".mlp.gate_up_proj.", 1),
        },
        orig_to_new_substr={"mot_gen": None, "fm_modules": None},
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "image":
            raise ValueError(f"NEO takes images and text, not {modality}: give the frames of a video as images")
        return IMAGE_TAG

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.configure_mm_token_handling(self.config.vocab_size, [self.config.img_context_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_model = NEOVisionModel(self.config.vision_config)
        with self._mark_language_model(vllm_config):
            self.language_model = NEOLanguageModel(vllm_config, maybe_prefix(prefix, "language_model"))

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """The tokens of images, `[image tokens, H]` for each."""
        pixels, grids = kwargs.get("pixel_values"), kwargs.get("grid_hw")
        if pixels is None:
            return ()
        merge = self.vision_model.embeddings.merge
        return self.vision_model(pixels, grids).split((grids.prod(dim=-1) // merge**2).tolist())

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """See `prompt_positions`."""
        merge = self.vision_model.embeddings.merge
        images = [
            (feature.mm_position.offset, *(feature.data["grid_hw"].data // merge).tolist()) for feature in mm_features
        ]
        config = self.config
        return prompt_positions(input_tokens, images, config.img_start_token_id, config.img_context_token_id)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x_TH = self.language_model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.language_model(x_TH, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _cpu_backend(width: int) -> type:
    from neo_megatron.vllm_plugin.cpu_attention import NEOCPUAttentionBackend

    if not NEOCPUAttentionBackend.supports_head_size(width):
        raise ValueError(
            f"query heads of {width} channels: vLLM's attention on a CPU has "
            f"{', '.join(map(str, NEOCPUAttentionBackend.get_supported_head_sizes()))}"
        )
    return NEOCPUAttentionBackend
