"""Hooks of `generate()` of transformers (4.57 to 5.24): inputs of a step, and rows repeated with their images.

Shape suffixes: B batch, L tokens, K tokens with those of the cache.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .positions_neo import document_numbers, image_numbers, one_grid, valid_tokens

# The name of the cache in this version of transformers.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
GROWING_CACHES = (None, "dynamic", "dynamic_full", "offloaded", "quantized")
NO_STATIC_CACHE = "NEO generates over a cache that grows, not a static one: leave cache_implementation unset"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, under its name in any version of transformers: `past_key_values`, from 5.24 on `cache`.

    Raises:
        ValueError: two caches; a static one.
        TypeError: another object.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, Cache):
        raise TypeError(f"past_key_values is a {type(found).__name__}: pass a DynamicCache of transformers")
    if getattr(found, "is_compileable", False):
        raise ValueError(NO_STATIC_CACHE)
    return found


class NEOGenerationMixin(GenerationMixin):
    """`generate()` for a model with `_positions()`, which computes t, h and w."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_hw: Tensor | None = None,
        cache: Cache | None = None,
        image_grid_thw: Tensor | None = None,
        prompt_length: int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        labels: Tensor | None = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Arguments of the next call of `forward`, for a sequence that begins in the cache.

        Positions come from all the tokens, so that they are correct after a cache was cropped or reordered.
        Images that the cache holds are not passed on.

        Args:
            input_ids: `[B, K]`, those of the cache among them.
            prompt_length: tokens from here on were generated, so an image token among them is text.
            position_ids, cache_position, next_sequence_length: counted by some versions of transformers; ignored,
                because they follow from the tokens and the cache.
            is_first_iteration: the first step begins with more than the prompt if a draft was made of it.
            labels: left among the inputs by Trainers; not used.
            tokenizer: left among the inputs by transformers, which needs it for stop strings; not used.

        Raises:
            RuntimeError: transformers passes no cache although one is to be used.
            TypeError: an unknown argument.
            ValueError: not all tokens are given.
        """
        if unknown := [name for name, value in others.items() if value is not None]:
            raise TypeError(f"generate() got {', '.join(unknown)}, which NEO does not take: leave it out")
        cache = one_cache(past_key_values, cache)
        # The first step may have none: `forward` then makes a cache, which some versions rely on.
        has_generated = prompt_length is not None and input_ids.shape[1] > prompt_length
        if use_cache and cache is None and has_generated and not is_first_iteration:
            raise RuntimeError(
                f"generate() of transformers {transformers.__version__} hands no cache to NEO, so that every token "
                "would compute the sequence again: install a version from 4.57 to 5.24, or pass use_cache=False"
            )
        grid_hw = one_grid(grid_hw, image_grid_thw)
        cached = cache.get_seq_length() if cache is not None else 0
        if cached >= input_ids.shape[1]:
            raise ValueError(
                f"{input_ids.shape[1]} tokens over a cache of {cached}: pass all tokens to generate(), those of the "
                "cache as well, and at least one more"
            )
        valid_BK = valid_tokens(input_ids, attention_mask, 0)
        image_BK = image_numbers(input_ids, self.config, valid_BK, prompt_length)
        if cached:
            pixel_values, grid_hw = self._images_after(cached, image_BK, pixel_values, grid_hw)
        positions = self._positions(
            input_ids, torch.where(image_BK >= cached, image_BK, -1), document_numbers(valid_BK, None, 0), None, grid_hw
        )
        return {
            "input_ids": input_ids[:, cached:],
            "pixel_values": pixel_values,
            "grid_hw": grid_hw,
            "positions_thw": positions[:, cached:],
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "prompt_length": prompt_length,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }

    def _images_after(
        self, cached: int, image_BK: Tensor, pixel_values: Tensor | None, grid_hw: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Patches and grids of the images that begin after the cached tokens; ``None`` if there are none."""
        starts = [start for row in image_BK for start in row[row >= 0].unique().tolist()]
        new = [number for number, start in enumerate(starts) if start >= cached]
        if not new:
            return None, None
        _check_number(0 if grid_hw is None else len(grid_hw), len(starts))
        patches = pixel_values.split(grid_hw.prod(dim=-1).tolist())
        return torch.cat([patches[number] for number in new]), grid_hw[new]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats every row with its images, for beams and several answers; rows differ in their number of images.

        Raises:
            ValueError: not all images of the tokens are given; position_ids of several documents.
        """
        pixel_values = kwargs.pop("pixel_values", None)
        grid_hw = one_grid(kwargs.pop("grid_hw", None), kwargs.pop("image_grid_thw", None))
        attention_mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        # An assistant model is called with the prompt and the tokens generated so far.
        prompt_length = kwargs.pop("prompt_length", None) or input_ids.shape[1]
        valid_BK = valid_tokens(input_ids, attention_mask, 0)
        if position_ids is not None and bool((((position_ids == 0) & valid_BK).sum(dim=-1) > 1).any()):
            raise ValueError("position_ids count several documents in a row: generate() continues one in each row")
        image_BK = image_numbers(input_ids, self.config, valid_BK, prompt_length)
        images_of_row = [len(row[row >= 0].unique()) for row in image_BK]
        given = 0 if grid_hw is None else len(grid_hw)
        cache = one_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        needed = image_BK if given or cache is None else image_BK[:, cache.get_seq_length() :]
        if bool((needed >= 0).any()) or given:
            _check_number(given, sum(images_of_row))
        if pixel_values is not None and expand_size > 1:
            grids = grid_hw.split(images_of_row)
            patches = pixel_values.split([int(grid.prod(dim=-1).sum()) for grid in grids])
            pixel_values = torch.cat([row for row in patches for _ in range(expand_size)])
            grid_hw = torch.cat([row for row in grids for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, "pixel_values": pixel_values, "grid_hw": grid_hw, "prompt_length": prompt_length}

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        given = one_cache(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if given is not None:
            model_kwargs[CACHE] = given
        if getattr(config, "is_assistant", False):
            # 5.0 and 5.1 call `generate` of a draft model with what it has prepared for its first forward.
            model_kwargs.pop("positions_thw", None)
        if config.prefill_chunk_size is not None:
            raise ValueError(
                "NEO computes a prompt at once, as its images must not be cut: leave prefill_chunk_size unset"
            )
        if config.cache_implementation not in GROWING_CACHES:
            raise ValueError(NO_STATIC_CACHE)
        return config, model_kwargs

    def _get_stopping_criteria(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Stop strings need a vocabulary, and `transformers serve` passes the processor as the tokenizer."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return super()._get_stopping_criteria(*args, tokenizer=tokenizer, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """A draft model that is not a NEO gets the tokens alone: NEO checks its draft against the images."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.config.model_type != self.config.model_type:
            ours = ("pixel_values", "grid_hw", "prompt_length")
            kept = {name: value for name, value in kwargs["model_kwargs"].items() if name not in ours}
            kwargs["model_kwargs"] = kept
        return super()._get_candidate_generator(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The first call of `generate_batch`.

        Raises:
            NotImplementedError: always. Its paged cache and causal mask have no room for images.
        """
        raise NotImplementedError(
            "NEO has no continuous batching, as the tokens of an image see one another in both directions: "
            "pass a padded batch to generate()"
        )


def _check_number(given: int, needed: int) -> None:
    if given != needed:
        raise ValueError(
            f"{given} images for {needed} in input_ids: pass pixel_values and grid_hw of all of them, also of those "
            "that the cache holds or the attention_mask hides"
        )
