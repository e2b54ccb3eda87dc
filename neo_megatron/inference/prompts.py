"""What a NEO is asked: turns up to the one that it is to say, and pictures as the data path makes them.

A picture that `neo-megatron preprocess` rejects is rejected here, for the same reason and with the same sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from neo_megatron.data.config import Settings
from neo_megatron.data.conversation import Turn
from neo_megatron.data.image import (
    PATCH_VALUES,
    decode,
    decode_opened,
    patches_from_image,
    picture_grid,
    pixel_limit,
    read_picture,
)
from neo_megatron.data.prepare.media import load_media
from neo_megatron.data.prepare.records import Sample, is_unicode
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, count_tags
from neo_megatron.errors import Reason, RejectedSample

Picture = Image.Image | bytes | str | Path
"""A picture: opened, the bytes of its file, or where the file lies."""


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the turn that the model is to say.

    Args:
        turns: with an ``<image>`` tag for each picture, in order. A tag after a backslash, or in the turn of an
            assistant, is text.
        pictures: uint8 [cells, 4, 768] each, patches as `neo_megatron.data.image` cuts them.
        grids: (grid_h, grid_w) of each in patches.

    Raises:
        RejectedSample: pictures and tags differ in number; a ``<video>`` tag; a text is not Unicode.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[np.ndarray, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        texts = [turn.text for turn in self.turns if turn.role != "assistant"]
        tags = sum(count_tags(text, IMAGE_TAG) for text in texts)
        if tags != len(self.pictures):
            raise RejectedSample(
                Reason.PICTURE_COUNT,
                f"the prompt has {len(self.pictures)} pictures but {tags} {IMAGE_TAG} tags; a tag that is meant as "
                f"text is written \\{IMAGE_TAG}",
            )
        if any(count_tags(text, VIDEO_TAG) for text in texts):
            raise RejectedSample(
                Reason.VIDEO_COUNT,
                f"the prompt has a {VIDEO_TAG} tag: give the frames as images, with an {IMAGE_TAG} tag for each, or "
                f"write \\{VIDEO_TAG} for the word",
            )
        if not all(is_unicode(turn.text) for turn in self.turns):
            raise RejectedSample(Reason.MALFORMED, "the prompt holds half a surrogate pair, which is no text")


def new_prompt(question: str | Sequence[Turn], pictures: Sequence[Picture], settings: Settings) -> Prompt:
    """A prompt of one question, or of several turns, and its pictures.

    Args:
        question: with a tag for each picture; where it has none, the pictures stand in front of it.
        settings: the limits of pixels; several pictures share twice the limit of one.

    Raises:
        RejectedSample: for a picture that preprocessing would reject; pictures and tags differ in number.
    """
    turns = (user_turn(question, len(pictures)),) if isinstance(question, str) else tuple(question)
    limit = pixel_limit(settings.min_pixels, settings.max_pixels, len(pictures))
    patches, grids = [], []
    for number, picture in enumerate(pictures, start=1):
        image, name = _opened(picture, number)
        grids.append(picture_grid(image, name, settings.min_pixels, limit))
        patches.append(patches_from_image(image, grids[-1]))
    return Prompt(turns, tuple(patches), tuple(grids))


def user_turn(question: str, pictures: int) -> Turn:
    """A turn of the user; where the question says nothing of where its pictures belong, they stand in front of it."""
    tags = "" if count_tags(question, IMAGE_TAG) else f"{IMAGE_TAG}\n" * pictures
    return Turn("user", tags + question, False)


def prompt_of_sample(sample: Sample, turn: int, settings: Settings) -> Prompt:
    """The prompt in front of a turn of a checked sample; its pictures have the pixels that they have in training.

    Raises:
        RejectedSample, DataError: as `load_media`.
    """
    turns, pictures, grids = load_media(sample, settings)
    before = turns[:turn]
    count = sum(count_tags(one.text, IMAGE_TAG) for one in before)
    patches = tuple(picture.reshape(-1, 4, PATCH_VALUES) for picture in pictures[:count])
    return Prompt(before, patches, tuple(grids[:count]))


def _opened(picture: Picture, number: int) -> tuple[Image.Image, str]:
    """The decoded picture, and what to call it."""
    if isinstance(picture, (str, Path)):
        return decode(read_picture(str(picture)), str(picture)), str(picture)
    name = f"number {number}"
    return decode(picture, name) if isinstance(picture, bytes) else decode_opened(picture, name), name
