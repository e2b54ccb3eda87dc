"""Pages of text and images in order, which become documents: OBELICS, OmniCorpus, MMC4, and lists of typed parts."""

from collections.abc import Mapping
from typing import Any

from neo_megatron.data.prepare.record_keys import is_empty
from neo_megatron.data.prepare.schemas.documents import document
from neo_megatron.data.prepare.schemas.fields import Fields, Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.parts import PartFiles, pieces_of
from neo_megatron.data.prepare.schemas.tagged_text import IMAGE, MediaPlace, tagged
from neo_megatron.errors import Reason, RejectedSample

FIELDS = ("texts", "images", "text_list", "image_info", "image_name", "content")
_METADATA = ("metadata", "general_metadata", "url", "could_have_url_duplicate", "similarity_matrix")
_OF_IMAGE = ("matched_text_index", "matched_sim", "face_detections", "raw_url", "width", "height")


def claims(record: Mapping[str, Any]) -> bool:
    """Whether a record looks like a page of any of these data sets."""
    texts, content = record.get("texts"), record.get("content")
    return (
        (isinstance(record.get("images"), list) and isinstance(texts, list) and _are_texts(texts))
        or not is_empty(record.get("text_list"))
        or (isinstance(content, list) and bool(content) and isinstance(content[0], dict) and "type" in content[0])
    )


def convert(fields: Fields, options: SchemaOptions, origin: Origin) -> dict[str, Any]:
    """The page as a document.

    Raises:
        RejectedSample: the record is not a page, or its lists do not fit each other.
    """
    fields.ignore(*_METADATA)
    for form in (_from_texts, _from_text_list, _from_parts):
        if (found := form(fields)) is not None:
            return found
    raise RejectedSample(
        Reason.EMPTY_CONVERSATION,
        f"the record has neither {fields.key('texts')!r} and {fields.key('images')!r}, nor 'text_list', nor a list of "
        f"parts under 'content'; {fields.keys()}: name the right ones with --columns, or choose another --schema",
    )


def _from_texts(fields: Fields) -> dict[str, Any] | None:
    """OBELICS and OmniCorpus: two lists of one length, in which every place has either a text or an image."""
    texts = fields.take_list("texts")
    if not texts:
        return None
    images = fields.take_list("images")
    names = f"{fields.key('texts')!r} and {fields.key('images')!r}"
    if len(texts) != len(images):
        raise RejectedSample(
            Reason.MALFORMED, f"{names} must have one length, with null in the one where the other has an element"
        )
    pieces: list[str | MediaPlace] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if is_empty(text) == is_empty(image) or not _is_text_or_null(text):
            raise RejectedSample(
                Reason.MALFORMED, f"element {number} of {names} must be a string in the one and null in the other"
            )
        pieces.append(text if is_empty(image) else IMAGE)
    return fields.published(
        document(tagged(_on_lines(pieces, "\n\n"))), [image for image in images if not is_empty(image)]
    )


def _from_text_list(fields: Fields) -> dict[str, Any] | None:
    """MMC4: sentences, and images that stand in front of the sentence that they match."""
    texts = fields.take_list("text_list")
    if not texts:
        return None
    name = fields.key("image_name")
    at: dict[int, list[Any]] = {}
    for number, image in enumerate(fields.take_list("image_info")):
        index = image.get("matched_text_index") if isinstance(image, dict) else None
        if type(index) is not int or not 0 <= index < len(texts) or is_empty(image.get(name)):
            raise RejectedSample(
                Reason.MALFORMED,
                f"element {number} of {fields.key('image_info')!r} must have {name!r} and, under 'matched_text_index', "
                f"the number of one of the {len(texts)} texts",
            )
        if unread := next((key for key in image if key not in (*_OF_IMAGE, name) and not is_empty(image[key])), None):
            raise RejectedSample(
                Reason.UNSUPPORTED_KEY,
                f"element {number} of {fields.key('image_info')!r} has the key {unread!r:.80}, which is not read",
            )
        at.setdefault(index, []).append(image[name])
    pieces: list[str | MediaPlace] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RejectedSample(Reason.MALFORMED, f"element {number} of {fields.key('text_list')!r} must be a string")
        pieces += [*[IMAGE] * len(at.get(number, [])), text]
    return fields.published(
        document(tagged(_on_lines(pieces, " "))), [image for index in sorted(at) for image in at[index]]
    )


def _from_parts(fields: Fields) -> dict[str, Any] | None:
    """Typed parts, joined as they are: their texts have the white space between them."""
    content = fields.take_list("content")
    if not content:
        return None
    files = PartFiles()
    extra: dict[str, Any] = {}
    text = tagged(pieces_of(content, repr(fields.key("content")), files, extra))
    files.check()
    listed = [] if files.images else fields.take_images("images")
    return extra | fields.published(document(text), files.images or listed, files.videos)


def _on_lines(pieces: list[str | MediaPlace], between_texts: str) -> list[str | MediaPlace]:
    """The pieces with images on lines of their own, and ``between_texts`` between two texts."""
    joined: list[str | MediaPlace] = []
    for before, piece in zip([None, *pieces], pieces, strict=False):
        if before is not None:
            joined.append(between_texts if isinstance(before, str) and isinstance(piece, str) else "\n")
        joined.append(piece)
    return joined


def _are_texts(texts: list) -> bool:
    return bool(texts) and all(map(_is_text_or_null, texts))


def _is_text_or_null(value: object) -> bool:
    return value is None or isinstance(value, str)
