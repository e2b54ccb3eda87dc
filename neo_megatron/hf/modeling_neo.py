"""NEO for transformers (4.57 to 5.24): images and text in one decoder, with `generate()` over a growing cache.

Shape suffixes: B batch, L tokens of this call, K tokens with those of the cache, N patches, C image tokens, H hidden.

Some versions of transformers (4.57, 5.8) copy the files that this one imports and not what those import, so all of
them are named here.
"""

import difflib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_neo import kernel_mask
from .chat_neo import NEOChatMixin
from .configuration_neo import NEOChatConfig
from .decoder_neo import NEOLanguageModel
from .generation_neo import CACHE, NEOGenerationMixin, one_cache
from .kinds_neo import refuse_other_kinds  # noqa: F401 - for configuration_neo
from .loss_neo import trained_labels, weighted_loss
from .mask_neo import AttentionRule
from .positions_neo import (
    PACKING,
    after_tokens,
    document_numbers,
    image_numbers,
    image_token_positions,
    one_grid,
    packed_positions,
    text_positions,
    valid_tokens,
)
from .serving_neo import register_with_server  # noqa: F401 - for configuration_neo
from .tags_neo import IMAGE_TAG  # noqa: F401 - for chat_neo
from .vision_neo import NEOVisionModel

# Token id that stands for tokens given as vectors.
TEXT = -1


class NEOBackbone:
    """`model.base_model`: the model without its head, for trainers that compute logits and loss on their own.

    Published checkpoints name tensors so that no module holds just these parts; this shares those of the model.
    """

    def __init__(self, model: "NEOChatModel") -> None:
        self._model = model
        self.config = model.config
        self._tp_plan, self._pp_plan = model._tp_plan, model._pp_plan

    def __call__(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> BaseModelOutputWithPast | tuple:
        """`last_hidden_state [B, L, H]` after the final norm, for the arguments of `NEOChatModel.forward`."""
        decoded, cache, _ = self._model._decoded(*args, **kwargs)
        output = BaseModelOutputWithPast(**decoded, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output


class NEOChatModel(NEOChatMixin, PreTrainedModel, NEOGenerationMixin):
    """NEO with its head: `forward` for training and inference, `generate()` and `chat()`."""

    config_class = NEOChatConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["NEODecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # The generation branch of a NEO-unify, which its understanding branch runs without.
    _keys_to_ignore_on_load_unexpected = ["mot_gen", "fm_modules"]
    # transformers 5 reads the pairs, 4.57 the keys.
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config: NEOChatConfig) -> None:
        super().__init__(config)
        self.vision_model = NEOVisionModel(config.vision_config)
        self.language_model = NEOLanguageModel(config.llm_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but missing and unexpected tensors are errors instead of initialised or dropped.

        Raises:
            ValueError: the checkpoint is incomplete, or has tensors of another model, with their names.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what, key in (("lacks", "missing_keys"), ("has the unexpected", "unexpected_keys")):
            if names := sorted(info[key]):
                others = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ValueError(f"{args[0]} {what} {', '.join(names[:5])}{others}: give a complete NEO checkpoint")
        return (model, info) if output_loading_info else model

    @property
    def base_model(self) -> NEOBackbone:
        return NEOBackbone(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def set_attn_implementation(self, attn_implementation: str, *args: Any, **kwargs: Any) -> None:
        """As in transformers, without its warnings about submodules that have no such setting."""
        for part in (self.config.vision_config, self.config.llm_config):
            part._attn_implementation = attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
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
        inputs_embeds: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        cache: Cache | None = None,
        prompt_length: int | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss if labels are given.

        Args:
            input_ids: `[B, L]`, with `<IMG_CONTEXT>` for every image token, that is every 2x2 patches.
            pixel_values: `[N, 768]` normalised 16x16 patches of all images, row by row of the batch, each row-major.
            grid_hw: `[images, 2]` rows and columns of patches.
            attention_mask: `[B, K]`, 0 on padding, K counting the cache. Padding may lie anywhere; positions count
                the other tokens. Or boolean `[B, 1, L, K]`, True where a query sees a key, which needs positions_thw.
            position_ids: `[B, L]`, for packed sequences: 0 at the first token of every document, as
                `DataCollatorWithFlattening` counts them. Only these zeros are used.
            positions_thw: `[B, L, 3]`; by default they follow from the other arguments.
            past_key_values: a `DynamicCache`.
            labels: `[B, L]`, not shifted, -100 where nothing is predicted, so at the first token of every document.
                Those of image tokens are never predicted.
            loss_weight: `[B, L]`, not shifted; the loss is then the weighted mean.
            use_cache: by default as in the configuration, and never in training.
            logits_to_keep: how many of the last positions get logits (0: all), or which. A loss is that of as many.
            num_items_in_batch: divides the summed loss instead of the number of labels (gradient accumulation).
            output_attentions: also the weights of every layer, `[B, heads, L, K]`.
            inputs_embeds: `[B, L, H]` in place of input_ids, for text.
            image_grid_thw: `[images, 3]` in place of grid_hw, as Qwen-VL and TRL name it.
            cache: what transformers 5.24 calls past_key_values.
            prompt_length: image tokens from this position on are text, because a model may generate them.
            packing: `PACKING`, arguments that tell other models the documents of a pack; checked against position_ids.

        Raises:
            ValueError: images and `<IMG_CONTEXT>` tokens that do not fit each other; a cache of unknown history or
                under gradient checkpointing; attention weights of another kernel than the eager one.
            TypeError: an unknown argument.
        """
        if isinstance(logits_to_keep, Tensor) and labels is not None:
            raise ValueError("logits_to_keep selects places one by one, of which no loss is made: pass no labels")
        decoded, cache, image_BL = self._decoded(
            input_ids,
            pixel_values,
            grid_hw,
            attention_mask,
            position_ids,
            positions_thw,
            past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            inputs_embeds=inputs_embeds,
            image_grid_thw=image_grid_thw,
            cache=cache,
            prompt_length=prompt_length,
            **packing,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(decoded.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            labels, num_items_in_batch = trained_labels(labels, image_BL, self.config, num_items_in_batch)
            weight = None if loss_weight is None else loss_weight[:, keep]
            loss = weighted_loss(logits, labels[:, keep], weight, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            **{CACHE: cache},
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _decoded(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions_thw: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        cache: Cache | None = None,
        prompt_length: int | None = None,
        **packing: Any,
    ) -> tuple[BaseModelOutput, Cache | None, Tensor]:
        """All but the head, with the arguments of :meth:`forward`; the cache; the image `[B, L]` of every token."""
        if unknown := packing.keys() - set(PACKING):
            raise TypeError(unknown_argument(min(unknown)))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        grid_hw = one_grid(grid_hw, image_grid_thw)
        if input_ids is None:
            if pixel_values is not None:
                raise ValueError("inputs_embeds do not tell where images are: pass input_ids with pixel_values")
            input_ids = torch.full(inputs_embeds.shape[:2], TEXT, device=inputs_embeds.device)
        position_ids = packed_positions(input_ids, position_ids, packing)
        cache = self._usable_cache(one_cache(past_key_values, cache), use_cache)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        implementation = self.config._attn_implementation
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"{implementation} returns no attention weights: call model.set_attn_implementation('eager') for them"
            )
        cached = cache.get_seq_length() if cache is not None else 0
        dense = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        valid_BK = valid_tokens(input_ids, None if dense is not None else attention_mask, cached)
        valid_BL = valid_BK[:, cached:]
        image_BL = image_numbers(
            input_ids,
            self.config,
            valid_BL if attention_mask is not None and dense is None else None,
            None if prompt_length is None else max(0, prompt_length - cached),
        )
        given = positions_thw is not None
        if dense is not None:
            rule = dense
            if not given:
                raise ValueError("a mask of four dimensions does not determine positions: pass positions_thw with it")
        else:
            document_BK = document_numbers(valid_BK, position_ids, cached)
            rule = self._rule(image_BL, document_BK, cached)
            if not given:
                positions_thw = self._positions(input_ids, image_BL, document_BK, cache, grid_hw)
        mask = kernel_mask(rule, implementation, queries=input_ids.shape[1])
        embeddings = (
            self._embedded(input_ids, image_BL, pixel_values, grid_hw) if inputs_embeds is None else inputs_embeds
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        decoded = self.language_model.get_decoder()(
            embeddings,
            positions_thw,
            mask,
            cache,
            implementation,
            keep_states=bool(output_hidden_states),
            keep_weights=bool(output_attentions),
        )
        if cache is not None:
            # Given positions may continue other rows than the cache had, or fewer tokens.
            history = () if given else getattr(cache, "neo_history", (0,))[1:]
            after = after_tokens(input_ids, positions_thw[..., 0], valid_BL, self.config, *history)
            # After an image t differs from the number of cached tokens, so the cache stores it.
            cache.neo_history = (cache.get_seq_length(), *after)
        return decoded, None if use_cache is False else cache, image_BL

    def _usable_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache given, or a new one.

        Raises:
            ValueError: gradient checkpointing, which would fill it twice when it recomputes a layer.
        """
        if use_cache is None:
            use_cache = self.config.llm_config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None and self.training and torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError("gradient checkpointing computes layers twice and allows no cache: pass use_cache=False")
        return cache

    def _embedded(
        self, input_ids: Tensor, image_BL: Tensor, pixel_values: Tensor | None, grid_hw: Tensor | None
    ) -> Tensor:
        """`[B, L, H]`, the image tokens in their places."""
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_CH = self._image_tokens(pixel_values, grid_hw).to(embeddings.device, embeddings.dtype)
            return embeddings.masked_scatter((image_BL >= 0)[..., None].to(embeddings.device), image_CH)
        # One token alone has no <img> before it; a graph has no branch that depends on tokens.
        if input_ids.shape[1] > 1 and not torch.compiler.is_compiling() and bool((image_BL >= 0).any()):
            raise ValueError(
                "input_ids have places for images: pass pixel_values and grid_hw of the processor as well, or "
                "prompt_length where a model generated these tokens"
            )
        return embeddings

    def _image_tokens(self, pixel_values: Tensor, grid_hw: Tensor | None) -> Tensor:
        if grid_hw is None or int(grid_hw.prod(dim=-1).sum()) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} patches do not fit grid_hw: pass both as the processor returns them")
        return self.vision_model(pixel_values, grid_hw)

    def _rule(self, image_BL: Tensor, document_BK: Tensor, cached: int) -> AttentionRule:
        """The mask of this call; images in the cache are seen like text before them."""
        image_BK = nn.functional.pad(image_BL, (cached, 0), value=-1)
        return AttentionRule(
            document_BK, image_BK, rows=torch.arange(cached, image_BK.shape[1], device=image_BK.device)
        )

    def _positions(
        self, input_ids: Tensor, image_BL: Tensor, document_BK: Tensor, cache: Cache | None, grid_hw: Tensor | None
    ) -> Tensor:
        """`[B, L, 3]`; t continues where the cache ends, h and w are those of the images in `grid_hw`."""
        cached = cache.get_seq_length() if cache is not None else 0
        length, *history = getattr(cache, "neo_history", (0,))
        if length != cached or any(rows.shape[0] != input_ids.shape[0] for rows in history):
            raise ValueError("the cache was changed since NEO filled it: pass positions_thw for the new tokens")
        positions = input_ids.new_zeros(*input_ids.shape, 3)
        positions[..., 0] = text_positions(input_ids, document_BK[:, cached:], self.config, *history)
        if grid_hw is not None:
            positions[..., 1:][image_BL >= 0] = image_token_positions(
                image_BL, grid_hw, self.vision_model.embeddings.merge
            )
        return positions


def unknown_argument(name: str) -> str:
    """The error message on an argument that `forward` does not take."""
    known = [*inspect.signature(NEOChatModel.forward).parameters][1:-1]
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
    return f"NEO got the argument {name!r}, which it does not know: {remedy}"
