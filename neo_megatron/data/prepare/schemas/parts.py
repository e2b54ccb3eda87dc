"""Typed parts of a message, the content lists of OpenAI and Hugging Face: text, images and videos in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neo_megatron.data.prepare.record_keys import IMAGE_KEYS, VIDEO_KEYS, is_empty
from neo_megatron.data.prepare.schemas.tagged_text import IMAGE, VIDEO, MediaPlace
from neo_megatron.errors import Reason, RejectedSample

_FILE_KEYS = ("url", "path")
_IMAGE_TYPES, _VIDEO_TYPES = ("image", "image_url", "input_image"), ("video", "video_url")
_TEXT_TYPES = ("text", "input_text", "output_text")
# Hints to a server or a processor, which do not change what is shown.
_HINTS = ("detail", "cache_control", "id")


@dataclass
class PartFiles:
    """The files that the parts of a record name, in order.

    Attributes:
        images: of the parts that name one.
        videos: the same.
        bare: number of media parts that name no file, by tag; their files are listed outside of the messages.
    """

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    bare: dict[str, int] = field(default_factory=lambda: {IMAGE.tag: 0, VIDEO.tag: 0})

    def check(self) -> None:
        """Rejects a record in which only some of the parts name their files: which is which would be a guess."""
        for place, files in ((IMAGE, self.images), (VIDEO, self.videos)):
            if files and (bare := self.bare[place.tag]):
                raise RejectedSample(
                    Reason.MALFORMED,
                    f"{len(files)} parts for {place.tag} name a file and {bare} do not; name it in all of them or none",
                )


def pieces_of(content: list, where: str, files: PartFiles, extra: dict[str, Any]) -> list[str | MediaPlace]:
    """Text and places of media of a list of parts.

    Args:
        content: the parts.
        where: of the parts, for messages.
        files: the files of the parts are added here.
        extra: keys of parts that nothing reads are added here, as ``content[].key``.

    Raises:
        RejectedSample: a part is of a kind that is not read, or not of the form of its kind.
    """
    return [_piece(part, f"part {number} of {where}", files, extra) for number, part in enumerate(content)]


def _piece(part: object, where: str, files: PartFiles, extra: dict[str, Any]) -> str | MediaPlace:
    if not isinstance(part, dict):
        raise RejectedSample(Reason.MALFORMED, f"{where} must be an object with a 'type'")
    kind = part.get("type")
    others = {key: value for key, value in part.items() if key != "type" and not is_empty(value)}
    if kind in _TEXT_TYPES:
        text = others.pop("text", "")
        if not isinstance(text, str):
            raise RejectedSample(Reason.MALFORMED, f"{where} must have a string under 'text'")
        _keep(others, extra)
        return text
    if kind in _IMAGE_TYPES:
        _take_file(others, (*IMAGE_KEYS, *_FILE_KEYS), IMAGE, files.images, files, where)
    elif kind in _VIDEO_TYPES:
        _take_file(others, (*VIDEO_KEYS, *_FILE_KEYS), VIDEO, files.videos, files, where)
    else:
        raise RejectedSample(
            Reason.UNSUPPORTED_KEY,
            f"{where} is of the type {kind!r:.60}, which is not read; text, image, image_url and video are",
        )
    # Media in another form, such as base64 or source, must not be taken for a part without a file.
    if unread := next((key for key, value in others.items() if key not in _HINTS and not _is_number(value)), None):
        raise RejectedSample(Reason.UNSUPPORTED_KEY, f"{where} has the key {unread!r:.80}, which is not read")
    _keep(others, extra)
    return IMAGE if kind in _IMAGE_TYPES else VIDEO


def _take_file(
    others: dict[str, Any], keys: tuple[str, ...], place: MediaPlace, listed: list[Any], files: PartFiles, where: str
) -> None:
    found = [others.pop(key) for key in keys if key in others]
    for value in found[1:]:
        if value != found[0]:
            raise RejectedSample(Reason.MALFORMED, f"{where} names different files; keep one")
    if not found:
        files.bare[place.tag] += 1
        return
    file = found[0]
    if isinstance(file, dict) and "url" in file:  # of OpenAI: {"image_url": {"url": ..., "detail": ...}}
        others.update({key: value for key, value in file.items() if key != "url" and not is_empty(value)})
        file = file["url"]
    if isinstance(file, list):
        raise RejectedSample(Reason.MALFORMED, f"{where} must name one file, not a list")
    listed.append(file)


def _keep(others: Mapping[str, Any], extra: dict[str, Any]) -> None:
    for key, value in others.items():
        extra.setdefault(f"content[].{key}", value)


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)
