"""Tokens -> documents, pictures and the positions t, h, w: what the published layout of a sequence says of each token.

Shape suffixes: B batch, L tokens of this call, K tokens with those of the cache, C merged cells.
"""

from typing import Any

import torch
from torch import Tensor

from .configuration_neo import NEOChatConfig


def valid_tokens(tokens_BL: Tensor, attention_mask: Tensor | None, cached: int) -> Tensor:
    """False on padding, `[B, K]`.

    Raises:
        ValueError: a mask that does not count the cached tokens, or not the new ones.
    """
    shape = (len(tokens_BL), cached + tokens_BL.shape[1])
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=tokens_BL.device)
    if attention_mask.shape != shape:
        raise ValueError(
            f"an attention_mask of shape {list(attention_mask.shape)} for {list(shape)} tokens with the cached ones: "
            "extend it by one column for every new token"
        )
    return attention_mask.bool()


def document_numbers(valid_BK: Tensor, position_ids: Tensor | None, cached: int) -> Tensor:
    """Number of the document of every token, int32 `[B, K]`, -1 on padding.

    Args:
        position_ids: `[B, L]`, 0 at the first token of every document, as `DataCollatorWithFlattening` of transformers
            counts; ``None`` for one document in every row. With a cache it is not looked at: the cached document
            goes on.

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
    return torch.where(valid_BK, (position_ids == 0).cumsum(dim=-1), -1).int()


def text_positions(
    input_ids_BL: Tensor,
    document_BL: Tensor,
    config: NEOChatConfig,
    next_t_B: Tensor | int = 0,
    behind_start_B: Any = False,
) -> Tensor:
    """The position t `[B, L]`: text advances it by one, all tokens of one picture share it; 0 on padding.

    Args:
        document_BL: t begins anew where it changes; -1 on padding, which does not count.
        next_t_B, behind_start_B: where the cached part stopped; whether its last token was `<img>`.
    """
    valid = document_BL >= 0
    starts = torch.zeros_like(valid)
    starts[:, 1:] = input_ids_BL[:, :-1] == config.img_start_token_id
    starts[:, 0] = behind_start_B
    advance = ((input_ids_BL != config.img_context_token_id).long() + starts.long()) * valid
    counted = advance.cumsum(dim=-1)
    first = torch.zeros_like(valid)
    first[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
    before_document = torch.where(first, counted - advance, 0).cummax(dim=-1).values
    t = counted - before_document - 1
    if isinstance(next_t_B, Tensor):
        t = t + next_t_B[:, None]
    return t.clamp_min(0) * valid


def image_numbers(input_ids_BL: Tensor, config: NEOChatConfig) -> Tensor:
    """A number `[B, L]` that the tokens of one picture share and no other picture of the row has; -1 outside pictures.

    It is the position of the picture's `<img>`. An `<IMG_CONTEXT>` that follows no `<img>`, as a model may generate it,
    is no picture.
    """
    place = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
    context = input_ids_BL == config.img_context_token_id
    before = torch.where(context, -1, place).cummax(dim=-1).values
    behind_img = input_ids_BL.gather(1, before.clamp_min(0)) == config.img_start_token_id
    return torch.where(context & behind_img, before, -1)


def cell_positions(image_BL: Tensor, grid_hw: Tensor, merge: int) -> Tensor:
    """Row and column `[C, 2]` of every cell of all pictures, checked against the places that the text has for them."""
    grids = (grid_hw // merge).tolist()
    rows = torch.arange(len(image_BL), device=image_BL.device)[:, None] * image_BL.shape[1]
    places = torch.unique_consecutive((image_BL + rows)[image_BL >= 0], return_counts=True)[1].tolist()
    if places != [h * w for h, w in grids]:
        raise ValueError(
            f"the pictures take {[h * w for h, w in grids]} tokens, input_ids have {places} <IMG_CONTEXT> for them: "
            "pass input_ids, pixel_values and grid_hw of one call of the processor"
        )
    device = image_BL.device
    return torch.cat(
        [torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)) for h, w in grids]
    )
