"""Derives documents, images and the positions t, h, w from tokens, as in the published layout of a sequence.

Shape suffixes: B batch, L tokens of this call, K tokens with those of the cache, C image tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_neo import NEOChatConfig

# Arguments in which collators describe the documents of a pack, in addition to position_ids.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def valid_tokens(tokens_BL: Tensor, attention_mask: Tensor | None, cached: int) -> Tensor:
    """False on padding, `[B, K]`.

    Raises:
        ValueError: a mask that does not count the cached tokens, or not the new ones.
    """
    shape = (tokens_BL.shape[0], cached + tokens_BL.shape[1])
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=tokens_BL.device)
    if attention_mask.shape != shape:
        raise ValueError(
            f"an attention_mask of shape {list(attention_mask.shape)} for {list(shape)} tokens with the cached ones: "
            "extend it by one column for every new token"
        )
    return attention_mask.bool()


def packed_positions(input_ids_BL: Tensor, position_ids: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """`position_ids [B, L]` of a pack, from everything that collators say about its documents.

    Args:
        packing: `PACKING` -> as `DataCollatorWithFlattening` and TRL make them for other kernels: cumulated lengths
            `[documents + 1]`, the longest, the number `[1, L]` of every token's document.

    Raises:
        ValueError: they contradict one another or position_ids, or are of another length.
    """
    if all(packing.get(name) is None for name in PACKING):
        return position_ids
    place = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
    found = {} if position_ids is None else {"position_ids": position_ids == 0}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if (ends := packing.get(name)) is not None:
            if len(input_ids_BL) != 1 or ends[0] != 0 or ends[-1] != len(place):
                raise ValueError(
                    f"{name} runs from {ends[0]} to {ends[-1]} for input_ids of {list(input_ids_BL.shape)}"
                )
            found[name] = torch.isin(place, ends[:-1].to(place.device))[None]
    if (number := packing.get("seq_idx")) is not None:
        found["seq_idx"] = torch.cat([torch.ones_like(number[:, :1]), number.diff(dim=-1)], dim=-1) != 0
    if not found:
        raise ValueError("max_length_q and max_length_k say nothing without cu_seq_lens_q, or position_ids")
    (first, starts), *others = found.items()
    for name, other in others:
        if not torch.equal(starts, other.to(starts.device)):
            raise ValueError(f"{first} and {name} do not say that the same documents are in the pack: pass one of them")
    counted = place - torch.where(starts, place, 0).cummax(dim=-1).values
    for name in ("max_length_q", "max_length_k"):
        if packing.get(name) is not None and int(packing[name]) != int(counted.max()) + 1:
            raise ValueError(
                f"{name} is {int(packing[name])}, the longest document has {int(counted.max()) + 1} tokens"
            )
    return counted


def document_numbers(valid_BK: Tensor, position_ids: Tensor | None, cached: int) -> Tensor:
    """Number of the document of every token, int32 `[B, K]`, -1 on padding.

    Args:
        position_ids: `[B, L]`, 0 at the first token of every document, as `DataCollatorWithFlattening` of transformers
            counts; ``None`` for one document in every row. Ignored with a cache, whose document
            continues.

    Raises:
        ValueError: positions of another shape.
    """
    if position_ids is None or cached:
        return valid_BK.int() - 1
    if position_ids.shape != valid_BK.shape:
        raise ValueError(
            f"position_ids of shape {list(position_ids.shape)} for input_ids of {list(valid_BK.shape)}: "
            "give every token one, 0 at the first of every document; t, h and w follow from the tokens"
        )
    return torch.where(valid_BK, ((position_ids == 0) & valid_BK).cumsum(dim=-1), -1).int()


def text_positions(
    input_ids_BL: Tensor,
    document_BL: Tensor,
    config: NEOChatConfig,
    next_t_B: Tensor | int = 0,
    after_start_B: Any = False,
) -> Tensor:
    """The position t `[B, L]`: text advances it by one, all tokens of one image share it; 0 on padding.

    Padding does not count wherever it is: t continues after a hole in the attention mask as if the hole were not there.

    Args:
        document_BL: t starts at 0 where a new number begins; -1 on padding.
        next_t_B, after_start_B: the next t after the cached part; whether its last token was `<img>`.
    """
    valid = document_BL >= 0
    starts = _last_valid(input_ids_BL == config.img_start_token_id, valid, after_start_B)[:, :-1]
    advance = ((input_ids_BL != config.img_context_token_id).long() + starts.long()) * valid
    counted = advance.cumsum(dim=-1)
    newest = document_BL.cummax(dim=-1).values
    first = torch.zeros_like(valid)
    first[:, 1:] = newest[:, 1:] != newest[:, :-1]
    before_document = torch.where(first, counted - advance, 0).cummax(dim=-1).values
    t = counted - before_document - 1
    if isinstance(next_t_B, Tensor):
        t = t + next_t_B[:, None]
    return t.clamp_min(0) * valid


def after_tokens(
    input_ids_BL: Tensor,
    t_BL: Tensor,
    valid_BL: Tensor,
    config: NEOChatConfig,
    next_t_B: Any = 0,
    after_start: Any = False,
) -> tuple[Tensor, Tensor]:
    """`next_t_B` and `after_start_B` of :func:`text_positions` for the call after this one."""
    next_t = (torch.where(valid_BL, t_BL, -1).amax(dim=-1) + 1).clamp_min(next_t_B)
    return next_t, _last_valid(input_ids_BL == config.img_start_token_id, valid_BL, after_start)[:, -1]


def _last_valid(flag_BL: Tensor, valid_BL: Tensor, before_B: Any) -> Tensor:
    """The flag of the last non-padding token before every position, and after the last one: `[B, L + 1]`."""
    place = torch.arange(1, flag_BL.shape[1] + 1, device=flag_BL.device)
    last = nn.functional.pad(torch.where(valid_BL, place, 0).cummax(dim=-1).values, (1, 0))
    flags = nn.functional.pad(flag_BL, (1, 0))
    flags[:, 0] = before_B
    return flags.gather(1, last)


def image_numbers(
    input_ids_BL: Tensor,
    config: NEOChatConfig,
    valid_BL: Tensor | None = None,
    prompt_length: int | None = None,
) -> Tensor:
    """A number `[B, L]` that the tokens of one image share and no other image of the row has; -1 outside images.

    It is the position of the image's `<img>`. An `<IMG_CONTEXT>` that follows no `<img>`, which a model may generate,
    is text.

    Args:
        valid_BL: False on padding, which may lie inside an image; an image that is all padding keeps its number.
        prompt_length: all tokens from here on are text.

    Raises:
        ValueError: padding that covers a part of an image.
    """
    place = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
    context, start = input_ids_BL == config.img_context_token_id, input_ids_BL == config.img_start_token_id
    skipped = context if valid_BL is None else context | ~(valid_BL | start)
    before = torch.where(skipped, -1, place).cummax(dim=-1).values
    number = torch.where(context & start.gather(1, before.clamp_min(0)), before, -1)
    if prompt_length is not None:
        number = torch.where(place < prompt_length, number, -1)
    if valid_BL is not None and not torch.compiler.is_compiling():
        hidden = (number >= 0) & (valid_BL != valid_BL.gather(1, number.clamp_min(0)))
        if bool(hidden.any()):
            row = int(hidden.any(dim=-1).nonzero()[0])
            raise ValueError(
                f"the attention_mask hides a part of an image in row {row}: hide its <img> and all of its "
                "<IMG_CONTEXT>, or none of them"
            )
    return number


def one_grid(grid_hw: Tensor | None, image_grid_thw: Tensor | None) -> Tensor | None:
    """Rows and columns of patches `[images, 2]`, given so or `[images, 3]` as Qwen-VL's processors and TRL name them.

    Raises:
        ValueError: both are given; an image of several frames.
    """
    if image_grid_thw is None:
        return grid_hw
    if grid_hw is not None:
        raise ValueError("grid_hw and image_grid_thw say the same: pass one of them")
    if bool((image_grid_thw[:, 0] != 1).any()):
        raise ValueError(f"image_grid_thw has images of {int(image_grid_thw[:, 0].max())} frames: NEO takes one")
    return image_grid_thw[:, 1:]


def image_token_positions(image_BL: Tensor, grid_hw: Tensor, merge: int) -> Tensor:
    """Row and column `[C, 2]` of every token of all images, checked against the image tokens in the text."""
    grids = (grid_hw // merge).tolist()
    rows = torch.arange(len(image_BL), device=image_BL.device)[:, None] * image_BL.shape[1]
    places = torch.unique_consecutive((image_BL + rows)[image_BL >= 0], return_counts=True)[1].tolist()
    if places != [h * w for h, w in grids]:
        raise ValueError(
            f"the images take {[h * w for h, w in grids]} tokens, input_ids have {places} <IMG_CONTEXT> for them: pass "
            "input_ids, pixel_values and grid_hw of one call of the processor, all tokens of an image in one forward"
        )
    device = image_BL.device
    return torch.cat(
        [torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)) for h, w in grids]
    )
