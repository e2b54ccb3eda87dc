"""Turns a question of lmms-eval's tasks into turns and images as NEO is trained on them."""

import re
from collections.abc import Sequence
from typing import Any

from neo_megatron.data.conversation import Turn
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, as_literal, count_tags, replace_tags
from neo_megatron.errors import DataError
from neo_megatron.inference.prompts import ImageInput

Message = dict[str, Any]
"""`{"role": ..., "content": [{"type": "text", "text": ...}, {"type": "image", "url": ...}, ...]}`"""


def messages_of(text: str, visuals: Sequence[Any] | None) -> list[Message]:
    """One user's message for tasks that give images and text separately: images first."""
    images = [{"type": "image", "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def turns_and_images(messages: Sequence[Message], system_prompt: str = "") -> tuple[list[Turn], list[ImageInput], int]:
    """The turns, with a tag for each image, the images in order, and the number of stray tags that were removed.

    A task's text may hold `<image>` where its images belong. If there are as many tags as images, they are
    the places of the images; otherwise they are left over from another model's format, and images stay where they are.
    A tag after a backslash is text, and so are `<video>`, and any tag in a system prompt or a message of the assistant.

    Args:
        system_prompt: replaces the task's own, if any.

    Raises:
        DataError: the message has a video or a sound, or a message of the assistant has an image.
    """
    turns, images, stray = [], [], 0
    if system_prompt:
        turns.append(Turn("system", as_literal(system_prompt), False))
    for message in messages:
        if system_prompt and message["role"] == "system":
            continue
        text, of_message, taken_out = _in_line(message["content"], message["role"])
        turns.append(Turn(message["role"], text, False))
        images += of_message
        stray += taken_out
    return turns, images, stray


def _in_line(content: str | Sequence[dict[str, Any]], role: str) -> tuple[str, list[ImageInput], int]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    images = [_image(part) for part in parts if part["type"] != "text"]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    if role == "assistant":
        if images:
            raise DataError("a task of lmms-eval gives an image that the assistant says: NEO answers in text")
        return as_literal(text), [], 0
    tags = count_tags(text, IMAGE_TAG)
    if tags == len(images):
        return _with_literal_videos(text), images, 0
    in_line = ""
    for part in parts:
        if part["type"] == "text":
            in_line += replace_tags(part["text"], IMAGE_TAG, lambda: "")
        else:  # images in front of all text are on lines of their own, as in training
            in_line += IMAGE_TAG if in_line.replace(f"{IMAGE_TAG}\n", "") else f"{IMAGE_TAG}\n"
    return _with_literal_videos(in_line), images, tags


def _with_literal_videos(text: str) -> str:
    """Escapes `<video>` tags: there are no videos, so the tag is a word."""
    return re.sub(rf"(\\*){VIDEO_TAG}", lambda tag: tag[0] if len(tag[1]) % 2 else f"\\{tag[0]}", text)


def _image(part: dict[str, Any]) -> ImageInput:
    """The image of a part. lmms-eval treats a path without an image suffix as video; sounds are dictionaries."""
    if part["type"] != "image" or isinstance(part["url"], dict):
        kind = part["type"] if part["type"] != "image" else "video or sound"
        raise DataError(f"a task of lmms-eval gives a {kind}: the neo plug-in answers questions about images and text")
    return part["url"]
