"""Each variant of the family written down once more, in float64 and with dense matrices: what the package is held to.

It shares no code with the package, and takes tensors and keys of `config.json` by their published names. Sources:
NEO (arXiv 2510.14979), SenseNova-U1 (arXiv 2605.12500) and the code published with it.

Shape suffixes: T tokens of a pack, P patches, H hidden, N heads, D channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

IMAGE_TOKEN, IMAGE_START = "img_context_token_id", "img_start_token_id"


@dataclass(frozen=True)
class Pack:
    """Documents one after another.

    Args:
        tokens, document: int64 ``[T]``.
        grids: rows and columns of patches of each image.
        patches: float64 ``[P, 768]``, normalised, row-major for each image, each (channel, row, column).
        weight: float64 ``[T]`` of the loss of the token that follows; 0 before a token that is not trained.
    """

    tokens: Tensor
    document: Tensor
    grids: list[tuple[int, int]]
    patches: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Computed:
    """The numbers of a pack.

    Args:
        logits: ``[T, V]``.
        loss: the weighted mean of the cross entropy.
        balance: loss of the routers, image tokens and text apart, summed over layers; 0 without experts.
        margin: the smallest distance between the logits of an expert that is chosen and of one that is not.
    """

    logits: Tensor
    loss: Tensor
    balance: Tensor
    margin: float


def compute(config: dict[str, Any], weights: dict[str, Tensor], pack: Pack) -> Computed:
    """Forward pass; gradients reach ``weights`` where these ask for them."""
    llm = config["llm_config"]
    context = pack.tokens == config[IMAGE_TOKEN]
    begins = context & (pack.tokens.roll(1) == config[IMAGE_START])
    image = torch.where(context, begins.cumsum(0), 0)
    t = torch.empty_like(pack.tokens)
    for number in pack.document.unique():
        of_document = pack.document == number
        t[of_document] = (~context | begins)[of_document].cumsum(0) - 1
    h, w = torch.zeros_like(t), torch.zeros_like(t)
    merged = [torch.cartesian_prod(torch.arange(rows // 2), torch.arange(columns // 2)) for rows, columns in pack.grids]
    if merged:
        h[context], w[context] = torch.cat(merged).view(-1, 2).T
    same_image = (image[:, None] == image) & context[:, None] & context
    sees = (pack.document[:, None] == pack.document) & ((t[:, None] >= t) | same_image)

    x = weights["language_model.model.embed_tokens.weight"][pack.tokens]
    if merged:
        embedded = _patch_embedding(config["vision_config"], weights, pack)
        x = torch.zeros_like(x).index_put((context.nonzero()[:, 0],), embedded) + x * ~context[:, None]
    balance, margin = x.new_zeros(()), math.inf
    for number in range(llm["num_hidden_layers"]):
        layer = _Layer(llm, weights, f"language_model.model.layers.{number}.")
        x = x + layer.attention(layer.norm(x, "input_layernorm"), (t, h, w), sees)
        normalised = layer.norm(x, "post_attention_layernorm")
        if not llm.get("num_experts"):
            x = x + layer.swiglu(normalised, "mlp.")
            continue
        added, of_layer, of_margin = layer.experts(normalised, context)
        x, balance, margin = x + added, balance + of_layer, min(margin, of_margin)
    x = _rms_norm(x, weights["language_model.model.norm.weight"], llm["rms_norm_eps"])
    head = "embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    name = next(name for name in weights if name.endswith(f"{head}.weight"))
    logits = x @ weights[name].T
    of_next = logits.log_softmax(dim=-1)[torch.arange(len(x)), pack.tokens.roll(-1)]
    return Computed(logits, -(of_next * pack.weight).sum() / pack.weight.sum(), balance, margin)


class _Layer:
    def __init__(self, llm: dict[str, Any], weights: dict[str, Tensor], prefix: str) -> None:
        self.llm, self._weights, self._prefix = llm, weights, prefix

    def weight(self, name: str) -> Tensor:
        return self._weights[f"{self._prefix}{name}.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return _rms_norm(x, self.weight(name), self.llm["rms_norm_eps"])

    def attention(self, x_TH: Tensor, positions: tuple[Tensor, Tensor, Tensor], sees_TT: Tensor) -> Tensor:
        llm = self.llm
        d, groups = llm["head_dim"], llm["num_key_value_heads"]
        query, key = self._rotated(x_TH, "q", positions), self._rotated(x_TH, "k", positions)
        value = self._heads(x_TH, "v_proj")
        shared_by = llm["num_attention_heads"] // groups
        out = []
        for head in range(llm["num_attention_heads"]):
            scores = query[:, head] @ key[:, head // shared_by].T / math.sqrt(d)
            out.append(scores.masked_fill(~sees_TT, -math.inf).softmax(dim=-1) @ value[:, head // shared_by])
        return torch.cat(out, dim=-1) @ self.weight("self_attn.o_proj").T

    def _heads(self, x_TH: Tensor, name: str) -> Tensor:
        return (x_TH @ self.weight(f"self_attn.{name}").T).unflatten(-1, (-1, self.llm["head_dim"]))

    def _rotated(self, x_TH: Tensor, which: str, positions: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """``[T, N, D]``: the channels for t, for h and for w."""
        d, norm = self.llm["head_dim"], f"self_attn.{which}_norm"
        heads = self._heads(x_TH, f"{which}_proj")
        if self.llm.get("attention_form") == "in-head":
            for_t = self.norm(heads[..., : d // 2], norm)
            for_hw = self.norm(heads[..., d // 2 :], f"{norm}_hw")
            parts = for_t, for_hw[..., : d // 4], for_hw[..., d // 4 :]
        else:
            for_hw = self._heads(x_TH, f"{which}_proj_hw")
            for_h, for_w = for_hw[..., : d // 2], for_hw[..., d // 2 :]
            parts = self.norm(heads, norm), self.norm(for_h, f"{norm}_h"), self.norm(for_w, f"{norm}_w")
        bases = self.llm["rope_theta"], self.llm["rope_theta_hw"], self.llm["rope_theta_hw"]
        return torch.cat([_rotate_halves(*it) for it in zip(parts, positions, bases, strict=True)], dim=-1)

    def swiglu(self, x_TH: Tensor, prefix: str) -> Tensor:
        gate, up, down = (self.weight(f"{prefix}{name}_proj") for name in ("gate", "up", "down"))
        return (silu(x_TH @ gate.T) * (x_TH @ up.T)) @ down.T

    def experts(self, x_TH: Tensor, context_T: Tensor) -> tuple[Tensor, Tensor, float]:
        """The outputs, the balance loss, and the margin."""
        count, chosen_each = self.llm["num_experts"], self.llm["num_experts_per_tok"]
        logits = x_TH @ self.weight("mlp.gate").T
        probability = logits.softmax(dim=-1)
        ranked = logits.sort(dim=-1, descending=True)
        chosen = torch.zeros_like(probability).scatter(1, ranked.indices[:, :chosen_each], 1.0)
        share = probability * chosen
        if self.llm["norm_topk_prob"]:
            share = share / share.sum(dim=-1, keepdim=True)
        out = sum(share[:, [e]] * self.swiglu(x_TH, f"mlp.experts.{e}.") for e in range(count))
        balance = x_TH.new_zeros(())
        for of_modality in (context_T, ~context_T):
            if of_modality.any():
                frequency = chosen[of_modality].mean(dim=0) / chosen_each
                balance = balance + count * (frequency * probability[of_modality].mean(dim=0)).sum()
        gap = ranked.values[:, :-1] - ranked.values[:, 1:]
        return out, balance, gap[:, chosen_each - 1].min().item() if chosen_each < count else math.inf


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def _rotate_halves(x_TND: Tensor, position_T: Tensor, base: float) -> Tensor:
    """Channel i and channel i + D/2 turn by position * base^(-2i / D)."""
    half = x_TND.shape[-1] // 2
    angle = position_T[:, None, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x_TND[..., :half], x_TND[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def _patch_embedding(vision: dict[str, Any], weights: dict[str, Tensor], pack: Pack) -> Tensor:
    """``[T of images, H]``: convolution, GELU, rotation of neighbouring channels by column and row, convolution."""
    name = "vision_model.embeddings.{}_embedding.{}".format
    weight, bias = weights[name("patch", "weight")], weights[name("patch", "bias")]
    merge_weight, merge_bias = weights[name("dense", "weight")], weights[name("dense", "bias")]
    out, first = [], 0
    for rows, columns in pack.grids:
        patches = pack.patches[first : first + rows * columns]
        first += rows * columns
        x = patches @ weight.flatten(1).T + bias
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        half = x.shape[-1] // 2
        x = torch.cat(
            (
                _rotate_neighbours(x[:, :half], column, vision["rope_theta_vision"]),
                _rotate_neighbours(x[:, half:], row, vision["rope_theta_vision"]),
            ),
            dim=-1,
        )
        image = x.view(rows, columns, -1).permute(2, 0, 1)[None]
        merged = torch.nn.functional.conv2d(image, merge_weight, merge_bias, stride=2)
        out.append(merged[0].flatten(1).T)
    return torch.cat(out)


def _rotate_neighbours(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Channels 2i and 2i + 1 turn by position * base^(-2i / channels)."""
    channels = x.shape[-1]
    angle = position[:, None] * base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    even, odd = x[:, 0::2], x[:, 1::2]
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1)
    return turned.flatten(1)
