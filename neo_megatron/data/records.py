"""One annotation record -> checked samples. A record is only read, never changed, so it can be read twice."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neo_megatron.data.errors import Reason, RejectedSample
from neo_megatron.data.paths import resolve_path
from neo_megatron.data.registry import Source
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KINDS = {IMAGE_TAG: "pictures", VIDEO_TAG: "videos"}


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` in the words of the template, ``trained`` where the model learns to say it."""

    role: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """A conversation and its files: a picture for each ``<image>`` tag, a video for each ``<video>`` tag, in order."""

    turns: tuple[Turn, ...]
    pictures: tuple[str, ...]
    videos: tuple[str, ...] = ()


def parse_record(line: bytes | None) -> Iterator[tuple[int | None, object]]:
    """(element, sample as written) of a record; a list-packed record has several, any other one with element ``None``.

    Raises:
        RejectedSample: where the line is no JSON, or an empty list.
    """
    if line is None:
        raise RejectedSample(Reason.BROKEN_JSON, "the line is too long to be a record")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RejectedSample(Reason.BROKEN_JSON, f"the record is not valid JSON ({error})") from error
    if not isinstance(record, list):
        yield None, record
    elif not record:
        raise RejectedSample(Reason.MALFORMED, "the list of samples is empty")
    else:
        yield from enumerate(record)


def _list(value: object) -> list:
    """A value as written that may be a list, or stand alone."""
    return value if isinstance(value, list) else [value]


def check_sample(sample: object, source: Source) -> Sample:
    """Checks one sample as written and resolves its paths.

    Raises:
        RejectedSample: with what is wrong.
    """
    if not isinstance(sample, dict):
        raise RejectedSample(Reason.MALFORMED, f"a sample must be an object, not {type(sample).__name__}")
    turns = _check_turns(sample.get("conversations"))
    videos = _check_paths("video", sample.get("video"))
    pictures = _check_paths("image", sample.get("image"))
    turns = _match_tags(turns, videos, VIDEO_TAG, Reason.VIDEO_COUNT)
    turns = _match_tags(turns, pictures, IMAGE_TAG, Reason.PICTURE_COUNT)
    if not any(turn.trained for turn in turns):
        raise RejectedSample(Reason.NOTHING_TRAINED, "no assistant turn is trained on (all others are input)")
    return Sample(
        turns,
        tuple(resolve_path(path, source) for path in pictures),
        tuple(resolve_path(path, source) for path in videos),
    )


def _check_turns(conversation: object) -> tuple[Turn, ...]:
    if not conversation:
        raise RejectedSample(Reason.EMPTY_CONVERSATION, "'conversations' is missing or empty")
    if not isinstance(conversation, list):
        raise RejectedSample(Reason.MALFORMED, "'conversations' must be a list of turns")
    return tuple(_check_turn(number, turn) for number, turn in enumerate(conversation))


def _check_turn(number: int, turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise RejectedSample(Reason.MALFORMED, f"turn {number} must be an object with 'from' and 'value'")
    role, text, is_input = turn.get("from"), turn.get("value"), turn.get("is_input") or False
    if not isinstance(role, str) or role not in ROLES:
        raise RejectedSample(Reason.UNKNOWN_ROLE, f"turn {number} is from {role!r:.60}, not one of {', '.join(ROLES)}")
    if not isinstance(text, str) or not isinstance(is_input, bool):
        raise RejectedSample(
            Reason.MALFORMED, f"turn {number} must have a text under 'value', and a truth under 'is_input'"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectedSample(
            Reason.MALFORMED, f"turn {number} holds half a surrogate pair, which is no text"
        ) from error
    return Turn(ROLES[role], text, trained=ROLES[role] == "assistant" and not is_input)


def is_unicode(text: str) -> bool:
    """JSON can write one half of a surrogate pair, which no tokenizer and no file system takes."""
    return text.isascii() or re.search("[\ud800-\udfff]", text) is None


def _check_paths(key: str, value: object) -> tuple[str, ...]:
    paths = [] if value is None else _list(value)
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path or not is_unicode(path):
            raise RejectedSample(Reason.MALFORMED, f"'{key}' must be a path or a list of paths")
    return tuple(paths)


def _match_tags(turns: tuple[Turn, ...], paths: Sequence[str], tag: str, reason: Reason) -> tuple[Turn, ...]:
    """The turns with one tag for each path; a single file that no turn mentions belongs to the first human turn."""
    tags = sum(turn.text.count(tag) for turn in turns)
    human = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if len(paths) == 1 and tags == 0 and human is not None:
        turn = turns[human]
        return (*turns[:human], Turn(turn.role, f"{tag}\n{turn.text}", turn.trained), *turns[human + 1 :])
    if tags != len(paths):
        raise RejectedSample(reason, f"the sample has {len(paths)} {_KINDS[tag]} but {tags} {tag} tags")
    return turns
