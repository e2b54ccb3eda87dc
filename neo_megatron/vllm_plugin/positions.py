"""Positions t, h and w of a prompt, in the form in which vLLM keeps them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""An image's first token, and its rows and columns of tokens."""


def prompt_positions(
    tokens: Sequence[int], images: Iterable[Grid], image_start: int, image_context: int
) -> tuple[Tensor, int]:
    """Positions int64 `[3, tokens]` of a prompt, and what to add to the number of a later token to get its t.

    vLLM gives a generated token the same number on all axes, and NEO a text's token the row and column 0. Rows and
    columns of images are therefore stored as -1, -2, ..., and what is not negative is text. It also counts a generated
    token as one, whatever it is: after `<img>` or `<IMG_CONTEXT>` in an answer, t is not that of training.

    Args:
        image_start, image_context: the ids of `<img>` and `<IMG_CONTEXT>`.
    """
    ids = torch.tensor(tokens)
    advance = (ids != image_context).long()
    advance[1:] += ids[:-1] == image_start
    positions = torch.zeros(3, len(ids), dtype=torch.int64)
    positions[0] = advance.cumsum(0) - 1
    for start, rows, columns in images:
        end = start + rows * columns
        positions[1, start:end] = -1 - torch.arange(rows).repeat_interleave(columns)
        positions[2, start:end] = -1 - torch.arange(columns).repeat(rows)
    return positions, int(positions[0, -1]) + 1 - len(ids)


def in_image(position: Tensor) -> Tensor:
    """Row or column of an image's token, from its stored form; 0 for text."""
    return torch.where(position < 0, -1 - position, 0)
