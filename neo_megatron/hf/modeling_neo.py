"""NEO for transformers (4.57 and 5): pictures and text in one decoder, with `generate()` over a growing cache.

Shape suffixes: B batch, L tokens of this call, K tokens with those of the cache, N patches, C merged cells,
E patch-embedding width, H hidden, X values of a patch or a cell.

transformers 4.57 copies the files that this one imports and not what those import, so all of them are named here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, silu
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from .attention_neo import AttentionMask, CosSin, NEOAttention, NEORMSNorm, kernel_mask, rotary_cos_sin
from .chat_neo import NEOChatMixin
from .configuration_neo import NEOChatConfig, NEOLLMConfig, NEOVisionConfig
from .mask_neo import AttentionRule
from .positions_neo import cell_positions, document_numbers, image_numbers, text_positions, valid_tokens
from .tags_neo import IMAGE_TAG  # noqa: F401 - for chat_neo


def rotate_pairs(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotates the channel pairs (0, 1), (2, 3), ... of float32 `x [N, width]` by the position `[N]` of each row."""
    width = x.shape[-1]
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    angle = position[:, None].float() * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1)


class NEOPatchConvolution(nn.Conv2d):
    """A convolution whose stride is its size, as the matrix product that it is: `[..., X]`, X channel-first."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class NEOPatchEmbeddings(nn.Module):
    """Patches -> one vector per 2x2 cell."""

    def __init__(self, config: NEOVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.merge = round(1 / config.downsample_ratio)
        size, width = config.patch_size, config.hidden_size
        self.patch_embedding = NEOPatchConvolution(config.num_channels, width, kernel_size=size, stride=size)
        self.dense_embedding = NEOPatchConvolution(width, config.llm_hidden_size, self.merge, self.merge)

    def forward(self, pixel_values: Tensor, grid_hw: Tensor) -> Tensor:
        """`pixel_values [N, 768]`, row-major per picture; `grid_hw [pictures, 2]` in patches. Returns `[C, H]`."""
        patches_NE = self.rotate(gelu(self.patch_embedding(pixel_values)), grid_hw)
        return self.merge_cells(patches_NE, grid_hw)

    def rotate(self, patches_NE: Tensor, grid_hw: Tensor) -> Tensor:
        """First half of the channels by the patch's column, second half by its row, in float32."""
        column = torch.cat([torch.arange(w, device=patches_NE.device).repeat(h) for h, w in grid_hw.tolist()])
        row = torch.cat([torch.arange(h, device=patches_NE.device).repeat_interleave(w) for h, w in grid_hw.tolist()])
        theta = self.config.rope_theta_vision
        by_column, by_row = patches_NE.float().chunk(2, dim=-1)
        rotated = torch.cat([rotate_pairs(by_column, column, theta), rotate_pairs(by_row, row, theta)], dim=-1)
        return rotated.to(patches_NE.dtype)

    def merge_cells(self, patches_NE: Tensor, grid_hw: Tensor) -> Tensor:
        cells, start, m, E = [], 0, self.merge, patches_NE.shape[-1]
        for h, w in grid_hw.tolist():
            picture = patches_NE[start : start + h * w].view(h // m, m, w // m, m, E)
            cells.append(picture.permute(0, 2, 4, 1, 3).reshape(-1, E * m * m))
            start += h * w
        return self.dense_embedding(torch.cat(cells))


class NEOVisionModel(nn.Module):
    def __init__(self, config: NEOVisionConfig) -> None:
        super().__init__()
        self.embeddings = NEOPatchEmbeddings(config)

    def forward(self, pixel_values: Tensor, grid_hw: Tensor) -> Tensor:
        return self.embeddings(pixel_values, grid_hw)


class NEOMLP(nn.Module):
    def __init__(self, config: NEOLLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class NEODecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NEOLLMConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = NEOAttention(config, layer)
        self.mlp = NEOMLP(config)
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
        d, theta_hw = self.config.head_dim, self.config.rope_theta_hw
        rotary = (
            rotary_cos_sin(t, d, self.config.rope_theta),
            rotary_cos_sin(h, d // 2, theta_hw),
            rotary_cos_sin(w, d // 2, theta_hw),
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
    def __init__(self, config: NEOLLMConfig) -> None:
        super().__init__()
        self.model = NEODecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class NEOChatModel(NEOChatMixin, PreTrainedModel, GenerationMixin):
    config_class = NEOChatConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["NEODecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # transformers 5 reads the pairs, 4.57 the keys.
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config: NEOChatConfig) -> None:
        super().__init__(config)
        self.vision_model = NEOVisionModel(config.vision_config)
        self.language_model = NEOLanguageModel(config.llm_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which would make up a tensor that is missing and drop one that it does not know.

        Raises:
            ValueError: the checkpoint is not whole, with the names of what it lacks or has too many.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what, key in (("lacks", "missing_keys"), ("has the unexpected", "unexpected_keys")):
            if names := sorted(info[key]):
                others = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ValueError(f"{args[0]} {what} {', '.join(names[:5])}{others}: give a whole NEO checkpoint")
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.lm_head = value

    def set_attn_implementation(self, attn_implementation: str, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which would warn of the parts, for they are modules without a choice of their own."""
        for part in (self.config.vision_config, self.config.llm_config):
            part._attn_implementation = attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions_thw: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: `[B, L]`, with `<IMG_CONTEXT>` in place of every merged cell of every picture.
            pixel_values: `[N, 768]` normalised 16x16 patches of all pictures, row by row of the batch, each row-major.
            grid_hw: `[pictures, 2]` rows and columns of patches.
            attention_mask: `[B, K]`, 0 on padding, K counting the cache; or boolean `[B, 1, L, K]`, True where a query
                sees a key, which needs positions_thw.
            position_ids: `[B, L]`, for packed sequences: 0 at the first token of every document, as
                `DataCollatorWithFlattening` counts them. Nothing else of them is looked at.
            positions_thw: `[B, L, 3]`; by default they follow from the other arguments.
            labels: `[B, L]`, not shifted, -100 where nothing is predicted, so at the first token of every document.
            loss_weight: `[B, L]`, not shifted; the loss is then the weighted mean.
            logits_to_keep: how many of the last positions get logits (0: all), or which.
            num_items_in_batch: divides the summed loss instead of the number of labels (gradient accumulation).
            output_attentions: also the weights of every layer, `[B, heads, L, K]`.

        Raises:
            ValueError: pictures and `<IMG_CONTEXT>` tokens that do not fit each other; a cache of unknown history;
                attention weights of another kernel than the eager one.
        """
        use_cache = self.config.llm_config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache()
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError(
                "NEO generates over a cache that grows, not a static one: leave cache_implementation unset"
            )
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        implementation = self.config._attn_implementation
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"{implementation} makes no attention weights: call model.set_attn_implementation('eager') for them"
            )
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        image_BL = image_numbers(input_ids, self.config)
        if attention_mask is not None and attention_mask.dim() == 4:
            rule = attention_mask
            if positions_thw is None:
                raise ValueError("a mask of four dimensions says nothing of positions: pass positions_thw with it")
        else:
            document_BK = document_numbers(valid_tokens(input_ids, attention_mask, cached), position_ids, cached)
            rule = self._rule(image_BL, document_BK, cached)
            if positions_thw is None:
                positions_thw = self._positions(input_ids, image_BL, document_BK, past_key_values, grid_hw)
        mask = kernel_mask(rule, implementation, queries=input_ids.shape[1])
        if pixel_values is None and not cached and bool((image_BL >= 0).any()):
            raise ValueError(
                "input_ids have places for pictures: pass pixel_values and grid_hw of the processor as well"
            )

        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            cells_CH = self._cells(pixel_values, grid_hw).to(embeddings.device, embeddings.dtype)
            embeddings = embeddings.masked_scatter((image_BL >= 0)[..., None].to(embeddings.device), cells_CH)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        decoded = self.language_model.model(
            embeddings,
            positions_thw,
            mask,
            past_key_values,
            implementation,
            keep_states=bool(output_hidden_states),
            keep_weights=bool(output_attentions),
        )
        if past_key_values is not None:
            self._remember(past_key_values, input_ids, positions_thw)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(decoded.last_hidden_state[:, keep])
        loss = None if labels is None else weighted_loss(logits, labels, loss_weight, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_hw: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the next call of :meth:`forward` needs of a sequence of which the cache holds the beginning.

        Positions come from all the tokens, so that they are right after a cache was cropped or its rows exchanged.
        Pictures that the cache holds are not passed on.
        """
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        image_BL = image_numbers(input_ids, self.config)
        document_BL = document_numbers(valid_tokens(input_ids, attention_mask, 0), None, 0)
        if cached:
            pixel_values, grid_hw = self._pictures_behind(cached, image_BL, pixel_values, grid_hw)
        positions = self._positions(
            input_ids, torch.where(image_BL >= cached, image_BL, -1), document_BL, None, grid_hw
        )
        return {
            "input_ids": input_ids[:, cached:],
            "pixel_values": pixel_values,
            "grid_hw": grid_hw,
            "positions_thw": positions[:, cached:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            "output_attentions": kwargs.get("output_attentions"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
        }

    def _pictures_behind(
        self, cached: int, image_BL: Tensor, pixel_values: Tensor | None, grid_hw: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Patches and grids of the pictures that begin behind the cached tokens; ``None`` where there is none.

        Candidates of assisted decoding may hold tokens of pictures that nobody gave; they are text.
        """
        starts = [start for row in image_BL for start in row[row >= 0].unique().tolist()]
        new = [number for number, start in enumerate(starts) if start >= cached]
        if grid_hw is None or len(starts) != len(grid_hw) or not new:
            return None, None
        patches = pixel_values.split(grid_hw.prod(dim=-1).tolist())
        return torch.cat([patches[number] for number in new]), grid_hw[new]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and several answers repeat every row, and with it its pictures, of which rows differ in number.

        Raises:
            ValueError: not all pictures of the tokens are given.
        """
        pixel_values, grid_hw = kwargs.pop("pixel_values", None), kwargs.pop("grid_hw", None)
        image_BL = image_numbers(input_ids, self.config)
        pictures_of_row = [len(row[row >= 0].unique()) for row in image_BL]
        given = 0 if grid_hw is None else len(grid_hw)
        cache = kwargs.get("past_key_values")
        needed = image_BL if given or cache is None else image_BL[:, cache.get_seq_length() :]
        if given != sum(pictures_of_row) and bool((needed >= 0).any()):
            raise ValueError(
                f"{given} pictures for {sum(pictures_of_row)} in input_ids: pass pixel_values and grid_hw of all of "
                "them, also of those that past_key_values hold"
            )
        if pixel_values is not None and expand_size > 1:
            grids = grid_hw.split(pictures_of_row)
            patches = pixel_values.split([int(grid.prod(dim=-1).sum()) for grid in grids])
            pixel_values = torch.cat([row for row in patches for _ in range(expand_size)])
            grid_hw = torch.cat([row for row in grids for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, "pixel_values": pixel_values, "grid_hw": grid_hw}

    def _cells(self, pixel_values: Tensor, grid_hw: Tensor | None) -> Tensor:
        if grid_hw is None or int(grid_hw.prod(dim=-1).sum()) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} patches do not fit grid_hw: pass both as the processor returns them")
        return self.vision_model(pixel_values, grid_hw)

    def _rule(self, image_BL: Tensor, document_BK: Tensor, cached: int) -> AttentionRule:
        """Who sees whom; cached pictures are seen whole, as text before is."""
        image_BK = nn.functional.pad(image_BL, (cached, 0), value=-1)
        return AttentionRule(
            document_BK, image_BK, rows=torch.arange(cached, image_BK.shape[1], device=image_BK.device)
        )

    def _positions(
        self, input_ids: Tensor, image_BL: Tensor, document_BK: Tensor, cache: Cache | None, grid_hw: Tensor | None
    ) -> Tensor:
        """`[B, L, 3]`; t goes on where the cache stopped, h and w are those of the pictures in `grid_hw`."""
        cached = cache.get_seq_length() if cache is not None else 0
        length, *history = getattr(cache, "neo_history", (0,))
        if length != cached:
            raise ValueError("the cache was changed since NEO filled it: pass positions_thw for the new tokens")
        positions = input_ids.new_zeros(*input_ids.shape, 3)
        positions[..., 0] = text_positions(input_ids, document_BK[:, cached:], self.config, *history)
        if grid_hw is not None:
            positions[..., 1:][image_BL >= 0] = cell_positions(image_BL, grid_hw, self.vision_model.embeddings.merge)
        return positions

    def _remember(self, cache: Cache, input_ids: Tensor, positions_thw: Tensor) -> None:
        """t is not the number of cached tokens once a picture was seen, so the cache carries it along."""
        next_t = positions_thw[..., 0].amax(dim=-1) + 1
        cache.neo_history = (cache.get_seq_length(), next_t, input_ids[:, -1] == self.config.img_start_token_id)


def weighted_loss(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of token i+1 from position i in float32: the weighted mean, or the sum over ``num_items``."""
    targets = labels[:, 1:].reshape(-1).to(logits.device)
    token_loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="none")
    weights = (targets != -100).float()
    if weight is not None:
        weights = weights * weight[:, 1:].reshape(-1).to(logits.device)
    return (token_loss * weights).sum() / (weights.sum() if num_items is None else num_items)
