"""Text of a turn from literal text and places of media: tags that occur in the text are escaped."""

from collections.abc import Iterable
from dataclasses import dataclass

from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, escape_tags


@dataclass(frozen=True)
class MediaPlace:
    """The place of an image or a video in a text."""

    tag: str


IMAGE, VIDEO = MediaPlace(IMAGE_TAG), MediaPlace(VIDEO_TAG)


def tagged(pieces: Iterable[str | MediaPlace]) -> str:
    """The text in which only the given places are tags: `split_tags` returns the pieces, neighbouring text joined."""
    text: list[str] = []
    literal: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            literal.append(piece)
        else:
            text += [_in_front_of_tag("".join(literal)), piece.tag]
            literal.clear()
    return "".join([*text, escape_tags("".join(literal))])


def places_in(text: str, placeholder: str) -> list[str | MediaPlace]:
    """Pieces of a text in which each placeholder is the place of an image; "" for a text without any."""
    if not placeholder:
        return [text]
    first, *others = text.split(placeholder)
    return [first, *(piece for other in others for piece in (IMAGE, other))]


def images_first(count: int, text: str) -> list[str | MediaPlace]:
    """Pieces of a text with images in front of it, one a line."""
    return [*(piece for _ in range(count) for piece in (IMAGE, "\n")), text]


def _in_front_of_tag(text: str) -> str:
    """Literal text, escaped; backslashes at its end are written twice, because a tag follows."""
    return escape_tags(text) + "\\" * (len(text) - len(text.rstrip("\\")))
