"""The errors that a command turns into one sentence, and the rejection of one sample.

A command shows only the text of a `NeoError` or an `OSError`; any other exception is a bug and keeps its traceback. An
exported checkpoint has a copy of this file, so only the standard library is used.
"""

import re
from enum import StrEnum
from typing import Any

# User and query of an address; access keys of AWS, tokens of Hugging Face, GitHub and GitLab.
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(r"(\b\w+://[^\s?'\"]+\?)[^\s'\"]+")
_KEYS = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\b(?:hf|ghp|gho|ghs|glpat)[_-][0-9A-Za-z_-]{16,}")


def redacted(text: str) -> str:
    """The text with ``***`` for the user and the query of every address in it, and for every access key.

    It is not in `redaction`, because exports have a copy of this file.
    """
    if "://" in text:
        text = _QUERY.sub(r"\1***", _USER.sub("***@", text))
    return _KEYS.sub("***", text)


class Reason(StrEnum):
    """Why a sample was rejected: the keys under which a manifest counts rejected samples.

    The values must not change, because manifests and `rejects.jsonl` of earlier versions have them: three of them use
    another word for an image.
    """

    BROKEN_JSON = "broken JSON"
    UNREADABLE_RECORD = "unreadable record"
    MALFORMED = "malformed record"
    UNKNOWN_ROLE = "unknown role"
    EMPTY_CONVERSATION = "empty conversation"
    NOTHING_TRAINED = "nothing to train on"
    EMPTY_ANSWER = "empty answer"
    UNSUPPORTED_KEY = "unsupported key"
    INLINE_MEDIA = "inline media"
    IMAGE_COUNT = "pictures and tags differ"
    VIDEO_COUNT = "videos and tags differ"
    REMOTE_PATH = "remote path"
    ARCHIVE_PATH = "path into an archive"
    OUTSIDE_ROOT = "path outside the root"
    MISSING_IMAGE = "missing picture"
    UNREADABLE_IMAGE = "unreadable picture"
    DECOMPRESSION_BOMB = "decompression bomb"
    ASPECT_RATIO = "aspect ratio"
    MISSING_VIDEO = "missing video"
    UNREADABLE_VIDEO = "unreadable video"
    OVER_LONG = "over-long sample"


class NeoError(Exception):
    """A command cannot continue; the text is one sentence for its user, with a remedy."""


class DataError(NeoError):
    """Annotations, images, shards or packs are missing, damaged or not valid."""


class ConfigError(NeoError, ValueError):
    """Flags, sizes or a parallel layout cannot work; a `ValueError` too, as callers from Python expect."""


class CheckpointError(NeoError, ValueError):
    """A checkpoint cannot be read, written or converted; a `ValueError` too, as callers from Python expect."""


class HubError(CheckpointError):
    """A hub id cannot be resolved or downloaded."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, incomplete or has another checksum."""


class DamagedFile(DataError):
    """A file of a data set is damaged.

    `damaged_file` makes it, since a process of a data loader sends only the text of an error, without attributes.

    Attributes:
        path: of the file.
        what: is wrong with it.
    """

    path = what = ""


def damaged_file(path: str, what: str, remedy: str) -> DamagedFile:
    """The error for a damaged file; the text ends with ``remedy``."""
    error = DamagedFile(f"{path} is damaged: {what}; {remedy}")
    error.path, error.what = path, what
    return error


class TooManyRejected(DataError):
    """More samples were rejected than --max-rejected allows; ``counts`` are the counts that a manifest would have."""

    def __init__(self, sentence: str, counts: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.counts = counts


class RejectedSample(Exception):
    """One sample cannot be used; ``sentence`` says why, without the file and the record."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        sentence = redacted(sentence)  # because it is written to rejects.jsonl and shown on pages
        super().__init__(reason, sentence)
        self.reason = reason
        self.sentence = sentence

    def row(self, file: str, record: int, element: int | None) -> dict[str, Any]:
        """The row of the sample in a ``rejects.jsonl``.

        Args:
            file: the annotation file.
            record: number of the record in it, from 0.
            element: number of the sample in a list-packed record, ``None`` for any other record.
        """
        return {
            "file": file,
            "record": record,
            "element": element,
            "kind": self.reason.value,
            "reason": self.sentence,
        }
