"""Plain documents: one string, all of which is trained on."""

from collections.abc import Mapping
from typing import Any

from neo_megatron.data.prepare.record_keys import IMAGE_KEYS, VIDEO_KEYS, is_empty
from neo_megatron.data.prepare.schemas.documents import document
from neo_megatron.data.prepare.schemas.fields import Fields, Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.tagged_text import tagged
from neo_megatron.errors import Reason, RejectedSample

FIELDS = ("text",)
_TEXT_KEYS = ("text", "txt")
_MEDIA = (*IMAGE_KEYS, *VIDEO_KEYS, "jpg", "jpeg", "png", "webp")


def claims(record: Mapping[str, Any]) -> bool:
    """Whether a record has a text and no media."""
    has_text = any(isinstance(record.get(key), str) and record[key] for key in _TEXT_KEYS)
    return has_text and all(is_empty(record.get(key)) for key in _MEDIA)


def convert(fields: Fields, options: SchemaOptions, origin: Origin) -> dict[str, Any]:
    """The text as a document; tags in it are text.

    Raises:
        RejectedSample: the record has no text.
    """
    text = fields.take_text(*_TEXT_KEYS)
    if not text:
        raise RejectedSample(
            Reason.EMPTY_CONVERSATION,
            f"the record has no text under {fields.key('text')!r}; {fields.keys()}: name the right one with "
            "--columns text=KEY",
        )
    return fields.published(document(tagged([text])))
