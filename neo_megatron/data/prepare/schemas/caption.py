"""An image and its caption: a document, or the answer to a prompt. Metadata of img2dataset say nothing about either."""

from collections.abc import Mapping
from typing import Any

from neo_megatron.data.permutation import key_of
from neo_megatron.data.prepare.record_keys import IMAGE_KEYS, is_empty
from neo_megatron.data.prepare.schemas.documents import document
from neo_megatron.data.prepare.schemas.fields import Fields, Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.tagged_text import images_first, tagged
from neo_megatron.errors import Reason, RejectedSample

FIELDS = ("image", "text")
_TEXT_KEYS = ("text", "caption", "txt")
_MEMBERS = ("jpg", "jpeg", "png", "webp")
_METADATA = (
    *("url", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif"),
    *("md5", "sha256", "sha512", "__key__", "__url__"),
)


def claims(record: Mapping[str, Any]) -> bool:
    """Whether a record has an image and a text."""
    has_image = any(not is_empty(record.get(key)) for key in (*IMAGE_KEYS, *_MEMBERS))
    return has_image and any(isinstance(record.get(key), str) and record[key] for key in _TEXT_KEYS)


def convert(fields: Fields, options: SchemaOptions, origin: Origin) -> dict[str, Any]:
    """The images in front of the caption; with prompts, one of them asks for it.

    Raises:
        RejectedSample: the record has no image or no caption.
    """
    fields.ignore(*_METADATA)
    text = fields.take_text(*_TEXT_KEYS)
    images = fields.take_images("image", *_MEMBERS)
    for found, name in ((images, "image"), (text, "text")):
        if not found:
            raise RejectedSample(
                Reason.EMPTY_ANSWER if name == "text" else Reason.IMAGE_COUNT,
                f"the record has no {'caption' if name == 'text' else 'image'} under {fields.key(name)!r}; "
                f"{fields.keys()}: name the right one with --columns {name}=KEY",
            )
    if not options.prompts:
        return fields.published(document(tagged(images_first(len(images), text))), images)
    element = -1 if origin.element is None else origin.element
    key = key_of("caption", origin.seed, origin.data_set, origin.file, origin.record, element)
    prompt = options.prompts[key % len(options.prompts)]
    turns = [
        {"from": "human", "value": tagged(images_first(len(images), prompt))},
        {"from": "gpt", "value": tagged([text])},
    ]
    return fields.published(turns, images)
