"""Prompts: the turns before the one that the model generates, and images preprocessed as in training.

An image that `neo-megatron preprocess` rejects is rejected here, for the same reason and with the same sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.image import (
    PATCH_VALUES,
    decode,
    decode_opened,
    image_grid,
    patches_from_image,
    pixel_limit,
)
from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.prepare.media import load_media
from neo_megatron.data.prepare.records import Sample, is_unicode
from neo_megatron.data.prepare.stored_file import image_bytes
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, count_tags
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.inference.prompt_forms import ImageText, arranged

ImageInput = Image.Image | bytes | str | Path
"""An image: opened, the bytes of its file, or its path."""


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the turn that the model generates.

    Args:
        turns: with an ``<image>`` tag for each image, in order. A tag after a backslash, or in the turn of an
            assistant, is text.
        images: uint8 [image tokens, 4, 768] each, patches as `neo_megatron.data.image` cuts them.
        grids: (grid_h, grid_w) of each in patches.

    Raises:
        RejectedSample: images and tags differ in number; a ``<video>`` tag; a text is not Unicode.
    """

    turns: tuple[Turn, ...]
    images: tuple[np.ndarray, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        texts = [turn.text for turn in self.turns if turn.role != "assistant"]
        tags = sum(count_tags(text, IMAGE_TAG) for text in texts)
        if tags != len(self.images):
            raise RejectedSample(
                Reason.IMAGE_COUNT,
                f"the prompt has {len(self.images)} images but {tags} {IMAGE_TAG} tags; a tag that is meant as "
                f"text is written \\{IMAGE_TAG}",
            )
        if any(count_tags(text, VIDEO_TAG) for text in texts):
            raise RejectedSample(
                Reason.VIDEO_COUNT,
                f"the prompt has a {VIDEO_TAG} tag: give the frames as images, with an {IMAGE_TAG} tag for each, or "
                f"write \\{VIDEO_TAG} for the word",
            )
        if not all(is_unicode(turn.text) for turn in self.turns):
            raise RejectedSample(Reason.MALFORMED, "the prompt holds an unpaired surrogate (invalid Unicode)")


def new_prompt(
    question: str | Sequence[Turn],
    images: Sequence[ImageInput],
    settings: PreprocessConfig,
    image_text: ImageText = "written",
) -> Prompt:
    """A prompt of one question, or of several turns, and its images.

    Args:
        question: with a tag for each image; without tags the images come in front of it.
        settings: the limits of pixels, and how several images share them.
        image_text: the places of the images of a turn, see `arranged`.

    Raises:
        RejectedSample: for an image that preprocessing would reject; images and tags differ in number.
    """
    turns = [user_turn(question, len(images))] if isinstance(question, str) else question
    limit = pixel_limit(settings.min_pixels, settings.max_pixels, len(images), settings.shared_image_tokens)
    patches, grids = [], []
    for number, given in enumerate(images, start=1):
        image, name = _opened(given, number)
        grids.append(image_grid(image, name, settings.min_pixels, limit))
        patches.append(patches_from_image(image, grids[-1]))
    return Prompt(tuple(arranged(turn, image_text) for turn in turns), tuple(patches), tuple(grids))


def user_turn(question: str, images: int) -> Turn:
    """A turn of the user; images of a question without tags come in front of it."""
    tags = "" if count_tags(question, IMAGE_TAG) else f"{IMAGE_TAG}\n" * images
    return Turn("user", tags + question, False)


def prompt_of_sample(
    sample: Sample, turn: int, settings: PreprocessConfig, image_text: ImageText = "written"
) -> Prompt:
    """The prompt in front of a turn of a checked sample; its images are preprocessed as in training.

    Args:
        image_text: the places of the images of a turn, see `arranged`.

    Raises:
        RejectedSample, DataError: as `load_media`.
    """
    sample = replace(sample, turns=tuple(arranged(one, image_text) for one in sample.turns))
    turns, images, grids = load_media(sample, settings)
    before = turns[:turn]
    count = sum(count_tags(one.text, IMAGE_TAG) for one in before)
    patches = tuple(image.reshape(-1, 4, PATCH_VALUES) for image in images[:count])
    return Prompt(before, patches, tuple(grids[:count]))


def _opened(given: ImageInput, number: int) -> tuple[Image.Image, str]:
    """The decoded image, and its name for messages."""
    with limited_memory():
        if isinstance(given, (str, Path)):
            return decode(image_bytes(str(given)), str(given)), str(given)
        name = f"number {number}"
        return decode(given, name) if isinstance(given, bytes) else decode_opened(given, name), name
