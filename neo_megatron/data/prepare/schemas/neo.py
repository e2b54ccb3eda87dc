"""The published form, of which LLaVA, ShareGPT and InternVL's annotations are; with other names or placeholders too."""

from typing import Any

from neo_megatron.data.prepare.record_keys import is_empty
from neo_megatron.data.prepare.schemas.fields import Fields, Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.tagged_text import places_in, tagged
from neo_megatron.errors import Reason, RejectedSample

FIELDS = ("conversations", "image", "video", "system", "id")
_ANSWERS = ("gpt", "assistant")


def convert(fields: Fields, options: SchemaOptions, origin: Origin) -> dict[str, Any]:
    """The record with its columns renamed and its placeholders replaced by tags.

    Raises:
        RejectedSample: a key of the record has the name that another one is given.
    """
    named = {ours: fields.take(ours) for ours, _ in options.columns}
    record = fields.rest()
    if taken := next((ours for ours in named if not is_empty(record.get(ours))), None):
        raise RejectedSample(
            Reason.MALFORMED, f"the record has both {taken!r} and {fields.key(taken)!r}, which columns name {taken!r}"
        )
    record |= {ours: value for ours, value in named.items() if value is not None}
    turns = record.get("conversations")
    if options.image_placeholder and isinstance(turns, list):
        record["conversations"] = [_with_places(turn, options.image_placeholder) for turn in turns]
    return record


def _with_places(turn: object, placeholder: str) -> object:
    if not isinstance(turn, dict) or turn.get("from") in _ANSWERS or not isinstance(turn.get("value"), str):
        return turn
    return turn | {"value": tagged(places_in(turn["value"], placeholder))}
