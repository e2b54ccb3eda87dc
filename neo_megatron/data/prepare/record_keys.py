"""Classifies the keys of a sample and of its turns: honoured, rejected, or ignored and reported.

Annotations come from many tools, and each has keys of its own. A key for media, tools, a system prompt or training
weights changes what the model learns, so it is never ignored: it is honoured, or the sample is rejected. The meaning of
a key is decided by its words ("imageURLs" is image and URLs), so that a spelling that is not listed is not missed.
docs/data.md has the table.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.errors import Reason, RejectedSample

# The first is the name that this project uses; the others mean the same.
IMAGE_KEYS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls"),
    *("img", "imgs", "img_path", "img_paths"),
)
VIDEO_KEYS = ("video", "videos", "video_path", "video_paths", "video_file", "video_files", "video_url", "video_urls")
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
# True or 1 trains on an assistant turn, false or 0 does not; other weights are not supported.
_WEIGHT_KEYS = (
    *("weight", "loss", "loss_weight", "loss_mask", "loss_scale"),
    *("train", "training", "trainable", "trained", "is_trained", "do_train"),
)
_FLAGS = frozenset(("is_input", *_WEIGHT_KEYS))
# Ids of records, and sizes of images, which are read from the files.
_SILENT = ("id", "width", "height", "width_list", "height_list")
_SAMPLE_KEYS = frozenset(("conversations", "is_input", *IMAGE_KEYS, *VIDEO_KEYS, *SYSTEM_KEYS, *_WEIGHT_KEYS, *_SILENT))
_TURN_KEYS = frozenset(("from", "value", "is_input", "answers", *_WEIGHT_KEYS))  # `answers` is for evaluation

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def _words(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(text))


_MEDIA = _words(
    "image images img imgs picture pictures pic pics photo photos video videos vid vids frame frames audio audios "
    "speech sound sounds wav media multimodal pixel pixels bbox bboxes box boxes objects segmentation segmentations"
)
_TOOLS = _words("tool tools function functions plugin plugins")
_WEIGHTS = _words("weight weights loss losses train training trainable trained mask masks masked kto")
_PREFERENCES = _words("chosen rejected")
# A key with one of these words only describes media or training: image_id, num_tools, train_split.
_ABOUT = _words(
    "id ids idx index width widths height heights size sizes shape count counts num number n source sources license "
    "type types format hash md sha fps duration length resolution ratio aspect quality score scores category "
    "categories class split has caption captions description mime date time author lang language dataset domain "
    "fingerprint version"
)
_MEANINGS = {
    "media": "media in a form that is not read; list the paths of images under 'image', of videos under 'video'",
    "tools": "tools, which NEO's template does not have; remove the sample, or the key where no tool is used",
    "system": "a system prompt in a form that is not read; write it as a string under 'system' of the sample",
    "weights": "a training weight that is not read; write true or false under 'train' of the turn",
    "preferences": "a preference pair, which pretraining does not use; keep the answer to train on in 'conversations'",
}


@lru_cache(maxsize=4096)
def _meaning(key: str) -> str:
    """The entry of ``_MEANINGS`` for a key that is not honoured; "" if it has none of these meanings."""
    words = [word.lower() for word in _WORD.findall(key)]
    if _ABOUT.intersection(words):
        return ""
    if words[:1] == ["system"]:
        return "system"
    if _PREFERENCES.intersection(words[:1]):
        return "preferences"
    known = (("tools", _TOOLS), ("weights", _WEIGHTS), ("media", _MEDIA))
    return next((meaning for meaning, of_it in known if of_it.intersection(words)), "")


def is_empty(value: object) -> bool:
    """Whether the value of a key is the same as no key."""
    return value is None or value in ("", [], {})


def check_keys(sample: Mapping[str, Any]) -> None:
    """Rejects a sample with a key, in itself or in a turn, that changes what is learned and is not honoured.

    Raises:
        RejectedSample: the text names the first such key.
    """
    _check_keys(sample, "the sample", _SAMPLE_KEYS)
    for number, turn in _turns(sample):
        _check_keys(turn, f"turn {number}", _TURN_KEYS)


def _check_keys(holder: Mapping[str, Any], where: str, honoured: frozenset[str]) -> None:
    for key, value in holder.items():
        if key in honoured or is_empty(value) or not (meaning := _meaning(key)):
            continue
        # A number or a boolean can be a weight, but neither media nor a prompt.
        if isinstance(value, str | list | dict | StoredFile) or meaning == "weights":
            raise RejectedSample(Reason.UNSUPPORTED_KEY, f"{where} has the key {key!r:.80}: {_MEANINGS[meaning]}")


def ignored_keys(sample: object) -> list[str]:
    """Keys that nothing reads of a sample that passed `check_keys`; those of turns as ``conversations[].key``."""
    if not isinstance(sample, dict):
        return []
    found = dict.fromkeys(key for key, value in sample.items() if key not in _SAMPLE_KEYS and not is_empty(value))
    for _, turn in _turns(sample):
        for key, value in turn.items():
            if key not in _TURN_KEYS and not is_empty(value):
                found[f"conversations[].{key}"] = None
    return list(found)


def _turns(sample: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    turns = sample.get("conversations")
    for number, turn in enumerate(turns if isinstance(turns, list) else []):
        if isinstance(turn, dict):
            yield number, turn


def media_value(sample: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, object]:
    """(key, value) of whichever key lists the files; the value is ``[]`` without files.

    Raises:
        RejectedSample: two keys list different files.
    """
    found = [(key, sample[key]) for key in keys if not is_empty(sample.get(key))]
    for key, value in found[1:]:
        first, before = found[0]
        if as_list(value) != as_list(before):
            raise RejectedSample(Reason.MALFORMED, f"{first!r} and {key!r} list different files; keep one of the keys")
    return found[0] if found else (keys[0], [])


def as_list(value: object) -> list:
    """A value that may be written as a list or alone, as a list."""
    return value if isinstance(value, list) else [value]


def system_text(sample: Mapping[str, Any]) -> str:
    """The system prompt of a sample outside of its turns; "" without one.

    Raises:
        RejectedSample: it is not a string, or two keys have different prompts.
    """
    found = {key: sample[key] for key in SYSTEM_KEYS if not is_empty(sample.get(key))}
    for key, value in found.items():
        if not isinstance(value, str):
            raise RejectedSample(Reason.MALFORMED, f"{key!r} of the sample must be a string")
    if len(set(found.values())) > 1:
        raise RejectedSample(Reason.MALFORMED, f"{' and '.join(map(repr, found))} are different system prompts")
    return next(iter(found.values()), "")


def training_flag(holder: Mapping[str, Any], where: str) -> tuple[str, bool] | None:
    """(key, whether to train) if a sample or a turn says so, else ``None``.

    Raises:
        RejectedSample: a value is not true, false, 1 or 0, or two keys contradict each other.
    """
    found: dict[str, bool] = {}
    if _FLAGS.isdisjoint(holder):
        return None
    for key in ("is_input", *_WEIGHT_KEYS):
        value = holder.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RejectedSample(
                Reason.MALFORMED if key == "is_input" else Reason.UNSUPPORTED_KEY,
                f"{where} has {key!r} {value!r:.40}: it must be true or false, 1 or 0; other weights are not supported",
            )
        if key != "is_input":
            found[key] = bool(value)
        elif value:  # false is its default
            found[key] = False
    if len(set(found.values())) > 1:
        raise RejectedSample(Reason.MALFORMED, f"{where} is both trained on and not: {', '.join(map(repr, found))}")
    return next(iter(found.items()), None)
