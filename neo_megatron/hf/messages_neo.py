"""Messages as Hugging Face, Qwen-VL and OpenAI users write them -> the one form that NEO's template renders.

Nothing of a message is dropped: what neither this file nor the template knows is an error that names it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .tags_neo import as_literal

# Keys under which a part may have its image.
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def template_reads(template: str, key: str) -> bool:
    """Whether a chat template looks at a key of this name, or a variable."""
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def template_has_variable(template: str, name: str) -> bool:
    """Whether a chat template reads a variable; mentions within its string literals do not count."""
    return template_reads(re.sub(r"'[^']*'|\"[^\"]*\"", "", template), name)


def as_conversations(conversation: Any) -> tuple[list[Sequence[Any]], bool]:
    """One conversation or several -> several, and whether they were.

    Raises:
        ValueError: nothing to render.
    """
    first = conversation[0] if isinstance(conversation, Sequence) and conversation else None
    if isinstance(first, (list, tuple)) or hasattr(first, "messages"):
        return [getattr(chat, "messages", chat) for chat in conversation], True
    return [getattr(conversation, "messages", conversation)], False


def checked_messages(chat: Any, template: str) -> list[dict[str, Any]]:
    """The messages of a conversation, every content a list of parts ``{"type": "text" or "image", ...}``.

    A tag that an assistant says is text, so it is escaped here.

    Args:
        template: which renders them; keys that it reads are passed on to it.

    Raises:
        ValueError: a message or a part that NEO cannot take, with its number and what is wrong.
    """
    if not isinstance(chat, Sequence) or isinstance(chat, str) or not chat:
        raise ValueError(f"a conversation is a list of messages, at least one, not {chat!r:.80}")
    return [_message(message, f"message {number}", template) for number, message in enumerate(chat, start=1)]


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images that come with the parts, in order."""
    return [
        part["image"]
        for message in messages
        for part in message["content"]
        if part["type"] == "image" and "image" in part
    ]


def _message(message: Any, name: str, template: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a dictionary with 'role' and 'content', not {message!r:.80}")
    message = _without_none(message)
    role, content = message.get("role"), message.get("content")
    for key, value in message.items():
        if key not in ("role", "content") and value != [] and not template_reads(template, key):
            raise ValueError(f"{name} has the key {key!r}, which NEO's template does not know: leave it out")
    if not isinstance(role, str) or content is None:
        raise ValueError(f"{name} has no {'content' if isinstance(role, str) else 'role'}")
    if isinstance(content, str):  # transformers 4.57 looks for images in a plain string and fails
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{name} must have a string or a list of parts under 'content', not {content!r:.80}")
    parts = [_part(part, f"{name}, part {number}", role) for number, part in enumerate(content, start=1)]
    return {**message, "content": parts}


def _part(part: Any, name: str, role: str) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(
            f"{name} has no type: write {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': ...}}"
        )
    part = _without_none(part)
    kind = part.pop("type")
    if kind == "text":
        text = part.pop("text", None)
        _check_empty(part, name)
        if not isinstance(text, str):
            raise ValueError(f"{name} must have a string under 'text', not {text!r:.80}")
        return {"type": "text", "text": as_literal(text) if role == "assistant" else text}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"{name} is a part of type {kind!r}: NEO takes text and images; give the frames of a video as images"
        )
    if role == "assistant":
        raise ValueError(
            f"{name} is an image that the assistant says: NEO answers in text, so move it to a user's turn"
        )
    given = [key for key in IMAGE_KEYS if key in part]
    if len(given) > 1:
        raise ValueError(f"{name} has its image under {' and '.join(map(repr, given))}: leave one of them")
    image = {"image": _image(given[0], part.pop(given[0]), name)} if given else {}
    _check_empty(part, name)
    return {"type": "image", **image}


def _image(key: str, image: Any, name: str) -> Any:
    if key == "base64":
        return f"data:image;base64,{image.decode('ascii') if isinstance(image, bytes) else image}"
    if isinstance(image, Mapping) and "url" in image:  # OpenAI's
        others = {other: value for other, value in image.items() if other != "url" and (other, value) != DETAIL}
        _check_empty(others, name)
        return image["url"]
    return image


DETAIL = ("detail", "auto")
"""A key of OpenAI's images and its only accepted value; other details set resolution, as ``max_pixels`` does here."""


def _check_empty(others: Mapping[str, Any], name: str) -> None:
    if others:
        raise ValueError(
            f"{name} has the key {sorted(others)[0]!r}, which NEO does not know: leave it out; limits of pixels are "
            "arguments of the processor (min_pixels, max_pixels)"
        )


def _without_none(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a data set hold None where a row lacks a key of another."""
    return {key: value for key, value in mapping.items() if value is not None}
