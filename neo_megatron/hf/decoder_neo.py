"""NEO's decoder and its head: Qwen3's layers with native attention.

Shape suffixes: B batch, L tokens of this call, K tokens with those of the cache, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .attention_neo import ATTENTION, AttentionMask, CosSin, NEORMSNorm, rotary_cos_sin
from .configuration_neo import NEOLLMConfig


class NEOMLP(nn.Module):
    """Qwen3's SwiGLU."""

    def __init__(self, config: NEOLLMConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class NEOExperts(nn.Module):
    """Qwen3-MoE's mixture of experts: a router, in float32 as in training, sends each token to some of the SwiGLUs."""

    def __init__(self, config: NEOLLMConfig) -> None:
        super().__init__()
        self.per_token, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(NEOMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, x_BLH: Tensor) -> Tensor:
        x_TH = x_BLH.flatten(0, -2)
        probability = linear(x_TH.float(), self.gate.weight.float()).softmax(dim=-1)
        weight, chosen = probability.topk(self.per_token, dim=-1)
        if self.normalised:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        out_TH = torch.zeros_like(x_TH)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            result = self.experts[number](x_TH[token]) * weight[token, place, None].to(x_TH.dtype)
            out_TH.index_add_(0, token, result)
        return out_TH.view_as(x_BLH)


class NEODecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of Qwen3 with NEO's attention."""

    def __init__(self, config: NEOLLMConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = ATTENTION[config.attention_form](config, layer)
        self.mlp = NEOExperts(config) if config.num_experts else NEOMLP(config, config.intermediate_size)
        self.input_layernorm = NEORMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NEORMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BLH: Tensor, mask: AttentionMask, rotary: tuple[CosSin, ...], cache: Cache | None, implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(x_BLH), mask, rotary, cache, implementation)
        x_BLH = x_BLH + attended
        return x_BLH + self.mlp(self.post_attention_layernorm(x_BLH)), weights


class NEODecoder(nn.Module):
    """Embedding, pre-buffer and post-LLM layers (one stack), final norm."""

    def __init__(self, config: NEOLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NEODecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = NEORMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BLH: Tensor,
        positions_thw: Tensor,
        mask: AttentionMask,
        cache: Cache | None,
        implementation: str,
        keep_states: bool,
        keep_weights: bool,
    ) -> BaseModelOutput:
        """The normalised output `[B, L, H]`; on demand the input of every layer before it, and attention weights."""
        t, h, w = positions_thw[:, None].unbind(dim=-1)  # [B, 1, L]: broadcast over heads
        # Channels for t; h and w have half as many.
        width = self.config.head_dim // (1 if self.config.attention_form == "separate" else 2)
        rotary = (
            rotary_cos_sin(t, width, self.config.rope_theta),
            rotary_cos_sin(h, width // 2, self.config.rope_theta_hw),
            rotary_cos_sin(w, width // 2, self.config.rope_theta_hw),
        )
        states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        for layer in self.layers:
            if keep_states:
                states.append(x_BLH)
            x_BLH, weights = layer(x_BLH, mask, rotary, cache, implementation)
            if keep_weights:
                attentions.append(weights)
        x_BLH = self.norm(x_BLH)
        return BaseModelOutput(
            last_hidden_state=x_BLH,
            hidden_states=(*states, x_BLH) if keep_states else None,
            attentions=tuple(attentions) if keep_weights else None,
        )


class NEOLanguageModel(nn.Module):
    """Decoder and head. Adapters may wrap it (`get_peft_model(model.language_model)`), so it is used by its methods."""

    def __init__(self, config: NEOLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = NEODecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_decoder(self) -> NEODecoder:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def enable_input_require_grads(self) -> None:
        """Lets gradients reach adapters through checkpointed layers whose own weights are frozen."""
        self.model.embed_tokens.register_forward_hook(lambda _, inputs, output: output.requires_grad_(True))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Required by adapters for causal language models; only the model around this one generates."""
        raise NotImplementedError("call generate() of the NEOChatModel, which knows the images")
