"""Chats whose turns have a ``role`` and a ``content``: of OpenAI, Hugging Face, ms-swift and LLaMA-Factory.

The content is a string, in which ``<image>`` is the place of an image as in the published form, or a list of typed
parts, whose places are the parts and whose text is literal. One list among the messages makes the strings literal too.
"""

from collections.abc import Mapping
from typing import Any

from neo_megatron.data.prepare.record_keys import is_empty
from neo_megatron.data.prepare.schemas.dialogues import from_instruction, from_query, from_texts
from neo_megatron.data.prepare.schemas.fields import Fields, Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.parts import PartFiles, pieces_of
from neo_megatron.data.prepare.schemas.tagged_text import MediaPlace, places_in, tagged
from neo_megatron.errors import Reason, RejectedSample

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_TOOL_ROLES = ("tool", "function", "ipython", "tool_call", "tool_response", "observation")
_TOOL_CALLS = ("tool_calls", "function_call")
FIELDS = (
    *("messages", "image", "texts", "query", "response", "history", "instruction", "input", "output"),
    *("role", "content"),
)


def claims(record: Mapping[str, Any]) -> bool:
    """Whether a record looks like a chat of any of these projects."""
    lists = [record.get("messages"), record.get("texts")]
    keys = {key for key, value in record.items() if not is_empty(value)}
    return (
        any(isinstance(value, list) and value and isinstance(value[0], dict) for value in lists)
        or {"query", "response"} <= keys
        or {"instruction", "output"} <= keys
    )


def convert(fields: Fields, options: SchemaOptions, origin: Origin) -> dict[str, Any]:
    """The published form of a chat.

    Raises:
        RejectedSample: the record is not a chat, or has turns that are not supported.
    """
    if messages := fields.take_list("messages"):
        return _from_messages(messages, fields, options)
    for other in (from_texts, from_query, from_instruction):
        if (found := other(fields, options.image_placeholder)) is not None:
            return found
    raise RejectedSample(
        Reason.EMPTY_CONVERSATION,
        f"the record has neither {fields.key('messages')!r} nor 'texts', 'query' and 'response', or 'instruction' and "
        f"'output'; {fields.keys()}: name the right one with --columns messages=KEY, or choose another --schema",
    )


def _from_messages(messages: list, fields: Fields, options: SchemaOptions) -> dict[str, Any]:
    keys = fields.key("role"), fields.key("content")
    files = PartFiles()
    is_typed = any(isinstance(message, dict) and isinstance(message.get(keys[1]), list) for message in messages)
    turns = [
        _turn(message, f"message {number}", keys, is_typed, options.image_placeholder, files)
        for number, message in enumerate(messages)
    ]
    files.check()
    listed = fields.take_images()
    if files.images and listed and files.images != listed:
        raise RejectedSample(
            Reason.MALFORMED, "the images of the messages differ from those of the record; keep one of the lists"
        )
    return fields.published(turns, files.images or listed, files.videos)


def _turn(
    message: object, where: str, keys: tuple[str, str], is_typed: bool, placeholder: str, files: PartFiles
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RejectedSample(Reason.MALFORMED, f"{where} must be an object with {keys[0]!r} and {keys[1]!r}")
    role, content = message.get(keys[0]), message.get(keys[1])
    _check_role(role, message, where)
    extra = {key: value for key, value in message.items() if key not in keys}
    if taken := next((key for key in ("from", "value") if not is_empty(extra.get(key))), None):
        raise RejectedSample(Reason.MALFORMED, f"{where} has both {keys[0]!r} and {taken!r}; keep one of the two forms")
    if isinstance(content, list):
        value = _typed(pieces_of(content, where, files, extra), role, where, placeholder)
    elif not isinstance(content, str):
        raise RejectedSample(Reason.MALFORMED, f"{where} must have a string or a list of parts under {keys[1]!r}")
    elif role != "assistant" and placeholder:
        value = tagged(places_in(content, placeholder))
    else:
        value = tagged([content]) if is_typed else content
    return {**extra, "from": _ROLES[role], "value": value}


def _check_role(role: object, message: Mapping[str, Any], where: str) -> None:
    calls = next((key for key in _TOOL_CALLS if not is_empty(message.get(key))), None)
    if calls or (isinstance(role, str) and role in _TOOL_ROLES):
        named = f"has {calls!r}" if calls else f"is of the role {role!r}"
        raise RejectedSample(
            Reason.UNSUPPORTED_KEY, f"{where} {named}: NEO's template does not have tools; remove the sample"
        )
    if not isinstance(role, str) or role not in _ROLES:
        raise RejectedSample(
            Reason.UNKNOWN_ROLE, f"{where} is of the role {role!r:.60}, not one of {', '.join(_ROLES)}"
        )


def _typed(pieces: list[str | MediaPlace], role: str, where: str, placeholder: str) -> str:
    if role == "assistant" and any(not isinstance(piece, str) for piece in pieces):
        raise RejectedSample(
            Reason.UNSUPPORTED_KEY,
            f"{where} has an image or a video in an assistant turn; move it to a turn of the user",
        )
    if role == "assistant":
        return tagged(pieces)
    laid_out: list[str | MediaPlace] = []
    leading = True
    for piece in pieces:
        if isinstance(piece, str):
            laid_out += places_in(piece, placeholder)
            leading = False
        else:  # media in front of all text are on lines of their own, as in the chat template of exports
            laid_out += [piece, "\n"] if leading else [piece]
    return tagged(laid_out)
