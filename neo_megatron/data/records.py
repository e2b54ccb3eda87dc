"""One annotation record -> checked samples. A record is only read, never changed, so it can be read twice."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neo_megatron.data.errors import Reason, RejectedSample
from neo_megatron.data.registry import Source

IMAGE_TAG = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` in the words of the template, ``trained`` where the model learns to say it."""

    role: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """A conversation and the files of its pictures, one for each ``<image>`` tag, in order."""

    turns: tuple[Turn, ...]
    pictures: tuple[str, ...]


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


def split_key(samples: Sequence[object]) -> int:
    """64 bits that decide on which side of a held-out split a record falls, all of its samples together.

    Hashes the names of the pictures and videos as they are written, so that all conversations about one picture fall on
    one side; the text where there are none. Growing, reordering or retokenizing a data set moves nothing.
    """
    media = [sample.get(key) for sample in samples if isinstance(sample, dict) for key in ("image", "video")]
    content = [name for name in media if name] or samples
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def check_sample(sample: object, source: Source) -> Sample:
    """Checks one sample as written and resolves its paths.

    Raises:
        RejectedSample: with what is wrong.
    """
    if not isinstance(sample, dict):
        raise RejectedSample(Reason.MALFORMED, f"a sample must be an object, not {type(sample).__name__}")
    if sample.get("video"):
        raise RejectedSample(Reason.VIDEO, "videos are not supported; give frames as pictures, a list under 'image'")
    turns = _check_turns(sample.get("conversations"))
    pictures = _check_pictures(sample.get("image"))
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if len(pictures) == 1 and tags == 0:
        turns, tags = _put_tag_in_front(turns)
    if tags != len(pictures):
        raise RejectedSample(
            Reason.PICTURE_COUNT, f"the sample has {len(pictures)} pictures but {tags} {IMAGE_TAG} tags"
        )
    if not any(turn.trained for turn in turns):
        raise RejectedSample(Reason.NOTHING_TRAINED, "no assistant turn is trained on (all others are input)")
    return Sample(turns, tuple(resolve_path(path, source) for path in pictures))


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


def _is_unicode(text: str) -> bool:
    """JSON can write one half of a surrogate pair, which no tokenizer and no file system takes."""
    return text.isascii() or re.search("[\ud800-\udfff]", text) is None


def _check_pictures(image: object) -> tuple[str, ...]:
    paths = image if isinstance(image, list) else [] if image is None else [image]
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
            raise RejectedSample(Reason.MALFORMED, "'image' must be a path or a list of paths")
    return tuple(paths)


def _put_tag_in_front(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], int]:
    """A single picture that no turn mentions belongs to the first human turn. A tag in a later turn is respected."""
    for number, turn in enumerate(turns):
        if turn.role == "user":
            tagged = Turn(turn.role, f"{IMAGE_TAG}\n{turn.text}", turn.trained)
            return (*turns[:number], tagged, *turns[number + 1 :]), 1
    return turns, 0


def resolve_path(path: str, source: Source) -> str:
    """Where a picture lies, symbolic links followed.

    Under an image root nothing outside it is reachable, by ``..``, an absolute path or a link. Without one an absolute
    path is taken as it stands, and a relative one may not leave the directory of the annotations.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", path):
        raise RejectedSample(Reason.REMOTE_PATH, f"{path!r:.200} is no local file; download it first")
    root = os.path.realpath(source.image_root or os.path.dirname(source.annotations))
    found = os.path.realpath(os.path.join(root, path))
    confined = bool(source.image_root) or not os.path.isabs(path)
    if confined and os.path.commonpath([root, found]) != root:
        raise RejectedSample(Reason.OUTSIDE_ROOT, f"{path!r:.200} lies outside {root}")
    return found
