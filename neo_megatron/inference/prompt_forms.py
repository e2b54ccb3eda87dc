"""The places of images in a question, as published evaluation kits ask: of NEO 1.0, NEO-ov and its spatial class.

A kit has a message: texts and images in order. Here it is the turn of a user with a tag for each image; a line break
after a tag belongs to the tag. How the frames of a video are written is `neo_megatron.data.prepare.video_text`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from neo_megatron.data.conversation import Turn
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, count_tags, escape_tags, split_tags

ImageText = Literal["written", "in-order", "numbered", "referenced"]


def arranged(turn: Turn, form: ImageText) -> Turn:
    r"""The turn with its images in another form; a turn that is not a user's, or has no image, as it is.

    Args:
        form: "written" changes nothing. "in-order" is NEO-ov's: ``<image>\n`` at the place of each. "numbered" is that
            of NEO 1.0 and of the spatial class: ``Image-1: <image>\n`` for each in front of the text, and ``<Image-1>``
            at the places, unless all are at one place. "referenced" is that of MUIRBench in both kits of NEO-ov:
            ``<Image-1>: <image>\n`` for each in front, and always ``<Image-1>`` at the places. A single image is in
            front in all forms but the last: ``<image>\n``, and then the texts, a line each. Numbers count in a turn.
    """
    images = count_tags(turn.text, IMAGE_TAG)
    if form == "written" or turn.role != "user" or not images:
        return turn
    texts = _texts(turn.text)
    if form == "referenced":
        head, references = "<Image-{}>: ", [f"<Image-{number}>" for number in range(1, images + 1)]
    elif images == 1:
        return replace(turn, text=f"{IMAGE_TAG}\n" + "\n".join(text for text in texts if text))
    elif form == "in-order":
        return replace(turn, text=_joined(texts, [f"{IMAGE_TAG}\n"] * images))
    else:
        together = not any(texts[1:-1])
        head, references = "Image-{}: ", ["" if together else f"<Image-{number}>" for number in range(1, images + 1)]
    front = "".join(f"{head.format(number)}{IMAGE_TAG}\n" for number in range(1, images + 1))
    return replace(turn, text=front + _joined(texts, references))


def _texts(text: str) -> list[str]:
    """The texts around the image tags, escaped; a line break after a tag is not in them."""
    texts = [""]
    for number, piece in enumerate(split_tags(text)):
        if number % 2 and piece == IMAGE_TAG:
            texts.append("")
        elif number % 2:
            texts[-1] += _before_tag(texts[-1]) + VIDEO_TAG
        else:
            texts[-1] += escape_tags(piece)
    return [texts[0], *(one.removeprefix("\n") for one in texts[1:])]


def _joined(texts: Sequence[str], between: Sequence[str]) -> str:
    joined = texts[0]
    for put, text in zip(between, texts[1:], strict=True):
        joined += (_before_tag(joined) if put.startswith(IMAGE_TAG) else "") + put + text
    return joined


def _before_tag(text: str) -> str:
    """The backslashes at the end of a text, which are written twice in front of a tag."""
    return text[len(text.rstrip("\\")) :]
