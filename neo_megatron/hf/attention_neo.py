"""NEO's native attention for transformers, and the kernels that `attn_implementation` chooses from.

    sdpa             PyTorch's scaled_dot_product_attention (the default)
    flex_attention   skips blocks that no query sees: for long packs, on one device; the first call compiles it
    eager            plain matrix products; the only one that returns attention weights

Shape suffixes: B batch, L tokens of this call, K tokens with those of the cache, H hidden, x channels of queries and
keys, d of values.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_neo import NEOLLMConfig
from .mask_neo import AttentionRule

CosSin = tuple[Tensor, Tensor]
AttentionMask = Tensor | BlockMask | None

# Query and key rows of one block of FlexAttention.
FLEX_BLOCK = (128, 128)


def kernel_mask(rule: AttentionRule | Tensor, implementation: str, queries: int) -> AttentionMask:
    """The attention mask in the form that the kernel takes; made once per call, for all layers.

    Args:
        rule: the rule, or a boolean `[B, 1, L, K]`.
        implementation: `config._attn_implementation`.
        queries: L.

    Returns:
        boolean `[B, 1, L, K]`, True where a query sees a key; blocks for FlexAttention.

    Raises:
        ValueError: a dense mask for FlexAttention, whose purpose is to avoid one.
    """
    in_blocks = _kernel(implementation, queries) == "flex_attention"
    if in_blocks and isinstance(rule, Tensor):
        raise ValueError("flex_attention accepts no mask of four dimensions: pass position_ids, 0 at every document")
    if not isinstance(rule, AttentionRule):
        return rule
    return rule.blocks(FLEX_BLOCK) if in_blocks else rule.dense()[:, None]


def kernel_function(implementation: str, queries: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The kernel that `attn_implementation` selects; takes the arguments of :func:`eager_attention_forward`."""
    name = _kernel(implementation, queries)
    return eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def _kernel(implementation: str, queries: int) -> str:
    """SDPA instead of FlexAttention for one query, which would recompile for every cache length and skip no block."""
    return "sdpa" if implementation == "flex_attention" and queries == 1 else implementation


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Softmax attention by its definition -> context `[B, L, heads, d]` and weights `[B, heads, L, K]`.

    Args:
        query: `[B, heads, L, x]`; key `[B, groups, K, x]`; value `[B, groups, K, d]`.
        attention_mask: boolean `[B, 1, L, K]`.
        scaling: of the scores.
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class NEORMSNorm(nn.Module):
    """RMSNorm in float32, rounded to the input's dtype before it is multiplied by the weight, as in Qwen3."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_cos_sin(position: Tensor, width: int, theta: float) -> CosSin:
    """Cos and sin `[..., width]` of a half-rotation, in float32 whatever the model's type.

    Frequencies are computed here and not kept as a buffer, which `model.to(bfloat16)` would round.
    """
    exponent = torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width
    angle = position[..., None].float() * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, cos_sin: CosSin) -> Tensor:
    """Rotates pairs (i, i + X/2) of the last dimension X by angles given as cosines and sines."""
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class NEOAttention(nn.Module):
    """Qwen3's attention, whose query and key heads have channels for t, h and w, each rotated by its own position."""

    def __init__(self, config: NEOLLMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # transformers' name
        # 1/sqrt(d) also where queries and keys are 2d wide: with h = w = 0 the layer is then Qwen3's.
        self.scaling = 1 / math.sqrt(config.head_dim)
        H, d = config.hidden_size, config.head_dim
        self.query_width, self.key_width = config.num_attention_heads * d, config.num_key_value_heads * d
        self.q_proj = nn.Linear(H, self.query_width, bias=False)
        self.k_proj = nn.Linear(H, self.key_width, bias=False)
        self.v_proj = nn.Linear(H, self.key_width, bias=False)
        self.o_proj = nn.Linear(self.query_width, H, bias=False)

    def forward(
        self, x_BLH: Tensor, mask: AttentionMask, rotary: tuple[CosSin, ...], cache: Cache | None, implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output `[B, L, H]` and, where the kernel is `eager`, its weights `[B, heads, L, K]`."""
        query, key = (
            torch.cat([rotate_halves(part, cos_sin) for part, cos_sin in zip(parts, rotary, strict=True)], dim=-1)
            for parts in self.normalised_parts(x_BLH)
        )
        value = self._heads(self.v_proj(x_BLH))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        kernel = kernel_function(implementation, queries=query.shape[2])
        context, weights = kernel(self, query, key, value, mask, scaling=self.scaling)
        return self.o_proj(context.flatten(2)), weights

    def normalised_parts(self, x_BLH: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The channels of queries and of keys for t, h and w, each `[B, heads, L, width]`."""
        raise NotImplementedError

    def _heads(self, x_BLX: Tensor) -> Tensor:
        return x_BLX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class NEOSeparateAttention(NEOAttention):
    """h and w have projections of their own, and queries and keys are 2d wide: NEO 1.0."""

    def __init__(self, config: NEOLLMConfig, layer: int) -> None:
        super().__init__(config, layer)
        d, eps = config.head_dim, config.rms_norm_eps
        self.q_proj_hw = nn.Linear(config.hidden_size, self.query_width, bias=False)
        self.k_proj_hw = nn.Linear(config.hidden_size, self.key_width, bias=False)
        self.q_norm, self.k_norm = NEORMSNorm(d, eps), NEORMSNorm(d, eps)
        self.q_norm_h, self.q_norm_w = NEORMSNorm(d // 2, eps), NEORMSNorm(d // 2, eps)
        self.k_norm_h, self.k_norm_w = NEORMSNorm(d // 2, eps), NEORMSNorm(d // 2, eps)

    def normalised_parts(self, x_BLH: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        query_h, query_w = self._heads(self.q_proj_hw(x_BLH)).chunk(2, dim=-1)
        key_h, key_w = self._heads(self.k_proj_hw(x_BLH)).chunk(2, dim=-1)
        return (
            (self.q_norm(self._heads(self.q_proj(x_BLH))), self.q_norm_h(query_h), self.q_norm_w(query_w)),
            (self.k_norm(self._heads(self.k_proj(x_BLH))), self.k_norm_h(key_h), self.k_norm_w(key_w)),
        )


class NEOInHeadAttention(NEOAttention):
    """Of the d channels of a head, half are for t and a quarter each for h and w, with one norm for these two."""

    def __init__(self, config: NEOLLMConfig, layer: int) -> None:
        super().__init__(config, layer)
        d, eps = config.head_dim, config.rms_norm_eps
        self.q_norm, self.k_norm = NEORMSNorm(d // 2, eps), NEORMSNorm(d // 2, eps)
        self.q_norm_hw, self.k_norm_hw = NEORMSNorm(d // 2, eps), NEORMSNorm(d // 2, eps)

    def normalised_parts(self, x_BLH: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        query_t, query_hw = self._heads(self.q_proj(x_BLH)).chunk(2, dim=-1)
        key_t, key_hw = self._heads(self.k_proj(x_BLH)).chunk(2, dim=-1)
        return (
            (self.q_norm(query_t), *self.q_norm_hw(query_hw).chunk(2, dim=-1)),
            (self.k_norm(key_t), *self.k_norm_hw(key_hw).chunk(2, dim=-1)),
        )


ATTENTION = {"separate": NEOSeparateAttention, "in-head": NEOInHeadAttention}
"""The class of each `attention_form`."""
