"""Chats as pairs of a question and an answer: the_cauldron, earlier forms of ms-swift, and Alpaca."""

from collections.abc import Sequence
from typing import Any

from neo_megatron.data.prepare.schemas.fields import Fields
from neo_megatron.data.prepare.schemas.tagged_text import images_first, places_in, tagged
from neo_megatron.errors import Reason, RejectedSample


def from_texts(fields: Fields, placeholder: str) -> dict[str, Any] | None:
    """the_cauldron: ``texts``, a list of ``user`` and ``assistant``; the ``images`` stand in front of the first one."""
    texts = fields.take_list("texts")
    if not texts:
        return None
    images = fields.take_images()
    turns: list[dict] = []
    for number, pair in enumerate(texts):
        where = f"element {number} of {fields.key('texts')!r}"
        if (
            not isinstance(pair, dict)
            or not isinstance(pair.get("user"), str)
            or not isinstance(pair.get("assistant"), str)
        ):
            raise RejectedSample(
                Reason.MALFORMED, f"{where} must be an object with strings under 'user' and 'assistant'"
            )
        extra = {key: value for key, value in pair.items() if key not in ("user", "assistant")}
        if placeholder:
            question = tagged(places_in(pair["user"], placeholder))
        else:
            question = tagged(images_first(0 if number else len(images), pair["user"]))
        turns += [{"from": "human", "value": question}, {**extra, "from": "gpt", "value": tagged([pair["assistant"]])}]
    return fields.published(turns, images)


def from_query(fields: Fields, placeholder: str) -> dict[str, Any] | None:
    """ms-swift before ``messages``: ``query`` and ``response``, with earlier pairs in ``history``."""
    query, response = fields.take_text("query"), fields.take_text("response")
    if not query or not response:
        return None
    return _dialogue([*_history(fields), (query, response)], fields, placeholder)


def from_instruction(fields: Fields, placeholder: str) -> dict[str, Any] | None:
    """Alpaca: ``instruction`` and ``input``, joined by a line break as LLaMA-Factory does, and ``output``."""
    instruction, output = fields.take_text("instruction"), fields.take_text("output")
    if not instruction or not output:
        return None
    question = "\n".join(text for text in (instruction, fields.take_text("input")) if text)
    return _dialogue([*_history(fields), (question, output)], fields, placeholder)


def _history(fields: Fields) -> list[tuple[str, str]]:
    pairs = fields.take_list("history")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RejectedSample(
                Reason.MALFORMED, f"element {number} of {fields.key('history')!r} must be a list of two strings"
            )
    return [tuple(pair) for pair in pairs]


def _dialogue(pairs: Sequence[tuple[str, str]], fields: Fields, placeholder: str) -> dict[str, Any]:
    """The turns of pairs, in which ``<image>`` is the place of an image."""
    turns = []
    for question, answer in pairs:
        asked = tagged(places_in(question, placeholder)) if placeholder else question
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return fields.published(turns, fields.take_images())
