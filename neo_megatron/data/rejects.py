"""Reads ``rejects.jsonl``, the list of rejected samples of shards and packs, and names the places of samples."""

import json
from collections.abc import Iterator
from typing import Any

from neo_megatron.data.manifest import REJECTS
from neo_megatron.errors import DataError
from neo_megatron.storage.base import Directory, join

_MAX_LINE = 1 << 20  # bytes; an entry names one file


def place_of(file: str, record: int, element: int | None) -> str:
    """The place of a sample, for messages: "train.json, record 3, sample 1"."""
    return f"{file}, record {record}" + ("" if element is None else f", sample {element}")


def reject_lines(directory: Directory) -> Iterator[dict[str, Any] | None]:
    """The entries in order, ``None`` for a line that is not an entry; reading ends after a line of over a megabyte.

    Raises:
        DataError: the file is missing.
    """
    with open(directory.local(REJECTS), "rb") as file:
        while line := file.readline(_MAX_LINE):
            yield _entry(line)
            if len(line) == _MAX_LINE:
                return


def read_rejects(directory: Directory) -> Iterator[dict[str, Any]]:
    """The entries: ``file``, ``record``, ``element`` or ``None``, ``kind`` and ``reason``; see `RejectedSample.row`.

    Raises:
        DataError: the file is missing, or a line is not an entry.
    """
    for number, entry in enumerate(reject_lines(directory), start=1):
        if entry is None:
            raise DataError(
                f"{join(directory.location, REJECTS)} is damaged: line {number} is not an entry of a rejected sample; "
                "copy it again"
            )
        yield entry


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not {"file", "record", "element", "kind", "reason"} <= entry.keys():
        return None
    texts = all(isinstance(entry[key], str) for key in ("file", "kind", "reason"))
    numbers = type(entry["record"]) is int and type(entry["element"]) in (int, type(None))
    return entry if texts and numbers else None
