"""Parses one annotation record and checks its samples; the record itself is never changed."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neo_megatron.data.config import ChatLayout
from neo_megatron.data.conversation import FURTHER_ROLES, Turn
from neo_megatron.data.prepare.foreign_media import inline_form, placeholder
from neo_megatron.data.prepare.media_paths import resolve_path
from neo_megatron.data.prepare.record_files import Record
from neo_megatron.data.prepare.record_keys import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    as_list,
    check_keys,
    media_value,
    system_text,
    training_flag,
)
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.stored_file import MediaFile, StoredFile, of_data_uri
from neo_megatron.data.tags import (
    IMAGE_TAG,
    VIDEO_TAG,
    as_literal,
    count_tags,
    escape_tags,
    literal_beyond,
    split_tags,
)
from neo_megatron.errors import Reason, RejectedSample

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    "document": "document",
}
_ROLES: dict[ChatLayout, dict[str, str]] = {
    "neo1_0": ROLES,
    "u1": ROLES | {role: role for role in FURTHER_ROLES},
}
_TRAINED_ROLES = ("assistant", "document")
_KINDS = {IMAGE_TAG: "images", VIDEO_TAG: "videos"}


@dataclass(frozen=True)
class Sample:
    """A conversation and its files: an image for each ``<image>`` tag, a video for each ``<video>`` tag, in order.

    Args:
        turns: all tags of assistant turns are escaped, because they are not places for media.
        images: paths, or files inside containers.
        videos: the same.
        placeholder: of another project, in the text of a sample without tags; it stays text.
        first_turn: index in ``turns`` of the first turn under ``conversations``: 1 if a system prompt has its own key.
        surplus_tags: ``<image>`` tags beyond the images, which stay text in layout u1; escaped in ``turns``.
    """

    turns: tuple[Turn, ...]
    images: tuple[MediaFile, ...]
    videos: tuple[MediaFile, ...] = ()
    placeholder: str = ""
    first_turn: int = 0
    surplus_tags: int = 0


def parse_record(line: Record) -> Iterator[tuple[int | None, Any]]:
    """(element, sample as written) of a record; a list-packed record has several, any other one with element ``None``.

    Raises:
        RejectedSample: the line is too long (``None``), not JSON, or an empty list; the record could not be read.
    """
    if isinstance(line, RejectedSample):
        raise line
    if line is None:
        raise RejectedSample(Reason.BROKEN_JSON, "the line is too long to be a record")
    try:
        record = line if isinstance(line, dict) else json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RejectedSample(Reason.BROKEN_JSON, f"the record is not valid JSON ({error})") from error
    if not isinstance(record, list):
        yield None, record
    elif not record:
        raise RejectedSample(Reason.MALFORMED, "the list of samples is empty")
    else:
        yield from enumerate(record)


def check_sample(sample: object, source: Source, layout: ChatLayout = "neo1_0") -> Sample:
    """Checks one sample as written and resolves its paths.

    Args:
        layout: decides which roles there are, and whether more tags than images are text.

    Raises:
        RejectedSample: the text says what is wrong.
    """
    if not isinstance(sample, dict):
        raise RejectedSample(Reason.MALFORMED, f"a sample must be an object, not {type(sample).__name__}")
    check_keys(sample)
    turns = _check_turns(sample.get("conversations"), list(sample), layout)
    videos = _check_paths(*media_value(sample, VIDEO_KEYS))
    images = _check_paths(*media_value(sample, IMAGE_KEYS))
    foreign = _foreign_media([turn for turn in turns if turn.role not in _TRAINED_ROLES])
    turns = _match_tags(turns, videos, VIDEO_TAG, Reason.VIDEO_COUNT)
    surplus = 0
    if layout == "u1":
        turns, surplus = _without_surplus(turns, len(images))
    turns = _match_tags(turns, images, IMAGE_TAG, Reason.IMAGE_COUNT)
    turns = tuple(_with_literal_tags(turn) if turn.role == "assistant" else turn for turn in turns)
    _check_trained(sample, turns)
    system = _own_system_turn(sample, turns)
    _check_document((*system, *turns))
    return Sample(
        (*system, *turns),
        tuple(_located(_decoded(image, source), source) for image in images),
        tuple(_located(video, source) for video in videos),
        foreign,
        len(system),
        surplus,
    )


def check_answers(sample: Sample) -> None:
    """Rejects a sample with a blank answer to train on, from which the model would learn to end at once.

    Raises:
        RejectedSample: the text has the number of the turn.
    """
    if (number := blank_answer(sample)) is not None:
        raise RejectedSample(
            Reason.EMPTY_ANSWER,
            f"turn {number - sample.first_turn} is an empty answer; correct it, or pass --empty-answers keep",
        )


def blank_answer(sample: Sample) -> int | None:
    """Number of the first turn that is trained on and blank, else ``None``."""
    return next(
        (number for number, turn in enumerate(sample.turns) if turn.trained and is_blank(turn.text)),
        None,
    )


def is_blank(text: str) -> bool:
    """Whether a text has only white space and characters without width."""
    return re.fullmatch(r"[\s\u200b-\u200f\u2060\ufeff]*", text) is not None


def _check_turns(conversation: object, keys: list[str], layout: ChatLayout) -> tuple[Turn, ...]:
    if not conversation:
        named = f"; its keys are {', '.join(map(repr, keys)):.200}: write its turns under 'conversations'"
        if "conversations" not in keys:
            named += ", or name its form with --schema messages, caption, interleaved or text"
        raise RejectedSample(Reason.EMPTY_CONVERSATION, "'conversations' is missing or empty" + (named if keys else ""))
    if not isinstance(conversation, list):
        raise RejectedSample(Reason.MALFORMED, "'conversations' must be a list of turns")
    return tuple(_check_turn(number, turn, layout) for number, turn in enumerate(conversation))


def _check_turn(number: int, turn: object, layout: ChatLayout) -> Turn:
    if not isinstance(turn, dict):
        raise RejectedSample(Reason.MALFORMED, f"turn {number} must be an object with 'from' and 'value'")
    role, text = turn.get("from"), turn.get("value")
    if role is None and "role" in turn:
        raise RejectedSample(
            Reason.UNKNOWN_ROLE,
            f"turn {number} has 'role'; rename 'role' to 'from' and 'content' to 'value', or pass --schema messages "
            "--columns messages=conversations",
        )
    roles = _ROLES[layout]
    if not isinstance(role, str) or role not in roles:
        of_u1 = f"; {role} is a role of --chat-layout u1" if role in FURTHER_ROLES else ""
        raise RejectedSample(
            Reason.UNKNOWN_ROLE, f"turn {number} is from {role!r:.60}, not one of {', '.join(roles)}{of_u1}"
        )
    if not isinstance(text, str):
        raise RejectedSample(Reason.MALFORMED, f"turn {number} must have a string under 'value'")
    if not is_unicode(text):
        raise RejectedSample(Reason.MALFORMED, f"turn {number} holds an unpaired surrogate (invalid Unicode)")
    role, flag = roles[role], training_flag(turn, f"turn {number}")
    if flag and flag[1] and role not in _TRAINED_ROLES:
        raise RejectedSample(
            Reason.UNSUPPORTED_KEY,
            f"turn {number} is of the {role}, and {flag[0]!r} says to train on it; only assistant turns are trained on",
        )
    return Turn(role, text, trained=role in _TRAINED_ROLES and (flag is None or flag[1]))


def _own_system_turn(sample: dict, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turn of a system prompt under a key of its own; its tags are text, because media do not belong there."""
    text = system_text(sample)
    written = next((turn.literal for turn in turns if turn.role == "system"), text)
    if written != text and text:
        raise RejectedSample(Reason.MALFORMED, "'system' of the sample and its system turn differ; keep one of them")
    if not is_unicode(text):
        raise RejectedSample(Reason.MALFORMED, "'system' of the sample holds an unpaired surrogate (invalid Unicode)")
    has_turn = any(turn.role == "system" for turn in turns)
    return () if has_turn or not text else (Turn("system", escape_tags(text), False),)


def _foreign_media(asked: Sequence[Turn]) -> str:
    """A placeholder of another project in turns without tags of this one, else "".

    Raises:
        RejectedSample: a path or an encoded file is in the text.
    """
    if inline := inline_form(turn.text for turn in asked):
        raise RejectedSample(
            Reason.INLINE_MEDIA,
            f"the text holds {inline!r:.120}, media in the form of another project; list the file under 'image' (or "
            f"'video') and write {IMAGE_TAG} (or {VIDEO_TAG}) in its place; \\{IMAGE_TAG} is text",
        )
    has_tags = any(count_tags(turn.text, tag) for turn in asked for tag in _KINDS)
    return "" if has_tags else placeholder(turn.literal for turn in asked)


def _check_trained(sample: dict, turns: tuple[Turn, ...]) -> None:
    flag = training_flag(sample, "the sample")
    if flag and not flag[1]:
        raise RejectedSample(Reason.NOTHING_TRAINED, f"{flag[0]!r} says that the sample is not to be trained on")
    if not any(turn.trained for turn in turns):
        raise RejectedSample(Reason.NOTHING_TRAINED, "no assistant turn is trained on")


def _check_document(turns: tuple[Turn, ...]) -> None:
    """Rejects a document that stands among turns of a chat, or has nothing to learn."""
    if not any(turn.role == "document" for turn in turns):
        return
    if len(turns) > 1:
        raise RejectedSample(
            Reason.MALFORMED, "a document must be the only turn of its sample, without a system prompt"
        )
    if is_blank("".join(split_tags(turns[0].text)[::2])):
        raise RejectedSample(Reason.NOTHING_TRAINED, "the document has no text")


def is_unicode(text: str) -> bool:
    """Whether a text has no unpaired surrogates, which JSON can have but no tokenizer and no file system accepts."""
    return text.isascii() or re.search("[\ud800-\udfff]", text) is None


def _located(file: MediaFile, source: Source) -> MediaFile:
    """A file with its path resolved; one inside a container is found already."""
    return file if isinstance(file, StoredFile) else resolve_path(file, source)


def _decoded(image: MediaFile, source: Source) -> MediaFile:
    """The image in a ``data:`` URI; anything else is returned as it is."""
    return image if isinstance(image, StoredFile) else of_data_uri(image, source.annotations) or image


def _check_paths(key: str, value: object) -> tuple[MediaFile, ...]:
    paths = as_list(value)
    for path in paths:
        if isinstance(path, StoredFile):
            continue
        if not isinstance(path, str) or not path or "\0" in path or not is_unicode(path):
            raise RejectedSample(Reason.MALFORMED, f"'{key}' must be a path or a list of paths")
    return tuple(paths)


def _match_tags(turns: tuple[Turn, ...], paths: Sequence[MediaFile], tag: str, reason: Reason) -> tuple[Turn, ...]:
    """The turns with one tag for each path; a single file that no turn mentions belongs to the first human turn.

    A tag of an assistant is text. It might also mean that the file belongs there, which is not supported: if only that
    would explain the number of files, the sample is rejected.
    """
    tags = sum(count_tags(turn.text, tag) for turn in turns if turn.role != "assistant")
    said = next((number for number, turn in enumerate(turns) if _says(turn, tag)), None)
    human = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if tags == len(paths):
        return turns
    if len(paths) == 1 and tags == 0 and said is None and human is not None:
        turn = turns[human]
        return (*turns[:human], Turn(turn.role, f"{tag}\n{turn.text}", turn.trained), *turns[human + 1 :])
    remedy = ""
    if tags:
        remedy = f"; a {tag} that is meant as text is written \\{tag}, in JSON \\\\{tag}"
    elif foreign := placeholder(turn.literal for turn in turns if turn.role != "assistant"):
        remedy = f"; its text has {foreign!r}, a placeholder of another project: write {tag} in its place"
        remedy += f", or pass --image-placeholder {foreign!r}" if tag == IMAGE_TAG else ""
    if said is not None:
        remedy = (
            f"; the {tag} of turn {said} is in an assistant turn, where it is text: move it to the turn of a user, or "
            f"write \\{tag} (in JSON \\\\{tag}) in the answer if it is meant as text"
        )
    raise RejectedSample(reason, f"the sample has {len(paths)} {_KINDS[tag]} but {tags} {tag} tags{remedy}")


def _without_surplus(turns: tuple[Turn, ...], images: int) -> tuple[tuple[Turn, ...], int]:
    """The turns with the tags beyond the images escaped, and how many those are.

    With a tag in an answer it is not known which tags are beyond, so the turns are returned as they are.
    """
    if any(_says(turn, IMAGE_TAG) or turn.role == "document" for turn in turns):
        return turns, 0
    found, seen = [], 0
    for turn in turns:
        found.append(replace(turn, text=literal_beyond(turn.text, IMAGE_TAG, max(0, images - seen))))
        seen += count_tags(turn.text, IMAGE_TAG)
    return tuple(found), max(0, seen - images)


def _says(turn: Turn, tag: str) -> bool:
    return turn.role == "assistant" and count_tags(turn.text, tag) > 0


def _with_literal_tags(turn: Turn) -> Turn:
    return turn if not any(tag in turn.text for tag in _KINDS) else replace(turn, text=as_literal(turn.text))
