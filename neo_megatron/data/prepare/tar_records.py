"""Reads a WebDataset tar: consecutive members with the same key are a record.

The key of a member is its path up to the first dot of the last component; the rest, in lower case, is its extension.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from neo_megatron.data.prepare.record_bounds import MAX_RECORD_BYTES, Bounds
from neo_megatron.data.prepare.record_keys import IMAGE_KEYS, VIDEO_KEYS, as_list, media_value
from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.data.prepare.tar_headers import BrokenTar, Member, members
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.storage.source_files import SourceFile

MAX_MEMBERS = 4096  # of a record
_GROUPS_AT_ONCE = 1024
_IMAGES = frozenset(["avif", "bmp", "gif", "jp2", "jpeg", "jpg", "jpe", "png", "ppm", "pnm", "tif", "tiff", "webp"])
_VIDEOS = frozenset(["mp4", "mov", "mkv", "webm", "avi", "mpeg", "mpg", "m4v"])
_TEXTS = frozenset(["txt", "text", "caption", "transcript", "cls"])
_JSON = frozenset(("json", "jsn"))


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member; WebDataset reads no member without both, here its extension is ""."""
    directory, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return (directory + slash + stem, extension.lower()) if stem and dot else (name, "")


def group_bounds(file: SourceFile, start: int = 0) -> Bounds:
    """Bounds of the groups of members with one key: from the first header to the header after the last."""
    waiting: list[tuple[int, int]] = []
    begin = end = start
    current: str | None = None
    broken, is_cut = "", False
    found = members(file, start)
    while True:
        try:
            member = next(found, None)
        except BrokenTar as error:
            member, broken, is_cut = None, str(error), not error.is_after_end
        if member is not None and member.kind == "a directory":
            continue
        key = None if member is None else split_name(member.name)[0]
        if key != current:
            if current is not None and not is_cut:  # what is missing of a tar may belong to its last group
                waiting.append((begin, end))
            current = key
            begin = member.begin if member else end
        if waiting and (member is None or len(waiting) >= _GROUPS_AT_ONCE):
            yield np.array(waiting, np.int64)
            waiting = []
        if member is None:
            return broken
        end = member.end


def read_groups(file: SourceFile, bounds: Iterable[tuple[int, int]]) -> Iterator[Any]:
    """A record, or why it is rejected, for the bounds of each group."""
    for begin, end in bounds:
        try:
            yield _record(file, begin, end)
        except RejectedSample as rejected:
            yield rejected


def _record(file: SourceFile, begin: int, end: int) -> dict[str, Any]:
    group: dict[str, Member] = {}
    try:
        for member in members(file, begin):
            if member.kind != "a directory":
                _add(group, member)
            if member.end >= end:
                break
    except BrokenTar as error:
        raise RejectedSample(
            Reason.UNREADABLE_RECORD, f"{error}; the tar has changed since it was first read"
        ) from error
    values = {extension: _value(file, member, extension) for extension, member in group.items()}
    written = next((value for value in values.values() if isinstance(value, dict)), None)
    key = split_name(next(iter(group.values())).name)[0]
    return _with_media(values, key) if written is None else _joined(written, values)


def _add(group: dict[str, Member], member: Member) -> None:
    extension = split_name(member.name)[1]
    why = ""
    if member.kind:
        why = f"is {member.kind}, not a file; write the file itself into the tar"
    elif not extension:
        why = "has no extension that says what it is; name it KEY.EXTENSION"
    elif extension in group:
        why = "is in the record twice; give each record a key of its own"
    elif len(group) >= MAX_MEMBERS:
        why = f"is one of over {MAX_MEMBERS} with the same key; give each record a key of its own"
    if why:
        raise RejectedSample(Reason.MALFORMED, f"the member {member.name!r:.200} {why}")
    group[extension] = member


def _value(file: SourceFile, member: Member, extension: str) -> Any:
    """The text or the JSON of a member; other members are read where they are used."""
    suffix = extension.rpartition(".")[2]
    if suffix not in _TEXTS and suffix not in _JSON:
        return StoredFile(file.name, member.name, None, member.offset, member.size, file.version)
    if member.size > MAX_RECORD_BYTES:
        raise RejectedSample(
            Reason.OVER_LONG,
            f"the member {member.name!r:.200} has over {MAX_RECORD_BYTES >> 20} MiB, too many for text",
        )
    data = file.pread(member.size, member.offset)
    try:
        text = data.decode("utf-8-sig")
        if suffix in _JSON:
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "JSON" if suffix in _JSON else "UTF-8"
        raise RejectedSample(
            Reason.BROKEN_JSON if suffix in _JSON else Reason.UNREADABLE_RECORD,
            f"the member {member.name!r:.200} is not valid {what} ({error})",
        ) from error
    return int(text) if suffix == "cls" and text.strip().isdecimal() and len(text) < 20 else text


def _of_kind(values: dict[str, Any], suffixes: frozenset[str]) -> dict[str, StoredFile]:
    return {
        extension: value
        for extension, value in values.items()
        if isinstance(value, StoredFile) and extension.rpartition(".")[2] in suffixes
    }


def _with_media(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The record of a group without an object in JSON: media by kind, other members by extension."""
    images, videos = _of_kind(values, _IMAGES), _of_kind(values, _VIDEOS)
    record: dict[str, Any] = {"__key__": key}
    record |= {"image": list(images.values())} if images else {}
    record |= {"video": list(videos.values())} if videos else {}
    return record | {name: value for name, value in values.items() if name not in images and name not in videos}


def _joined(record: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The object of a group with the media of its group, and the other members under their extensions.

    Raises:
        RejectedSample: it names media that the group does not have, or the group has media that it does not name.
    """
    images, videos = _of_kind(values, _IMAGES), _of_kind(values, _VIDEOS)
    result = {key: value for key, value in record.items() if key not in IMAGE_KEYS and key not in VIDEO_KEYS}
    for found, keys in ((images, IMAGE_KEYS), (videos, VIDEO_KEYS)):
        if media := _matched(record, list(found.values()), keys):
            result[keys[0]] = media
    for name, value in values.items():
        if value is record or name in images or name in videos:
            continue
        if name in result:
            raise RejectedSample(
                Reason.MALFORMED, f"the record has the key {name!r:.80} and a member with this extension"
            )
        result[name] = value
    return result


def _matched(record: dict[str, Any], found: list[StoredFile], keys: tuple[str, ...]) -> list[Any]:
    """The media of a record: all of its group, or in the order in which the record names them."""
    key, named = media_value(record, keys)
    if named == []:
        return found
    by_name = {PurePosixPath(file.name).name: file for file in found}
    matched = [
        by_name.get(PurePosixPath(name).name, name) if isinstance(name, str) else name for name in as_list(named)
    ]
    missing = next((name for name in matched if isinstance(name, str) and not name.startswith("data:")), None)
    if missing is not None:
        raise RejectedSample(
            Reason.MISSING_IMAGE if keys is IMAGE_KEYS else Reason.MISSING_VIDEO,
            f"{key!r} names {missing!r:.200}, which is not among the members of the record: "
            f"{', '.join(by_name) or 'it has none'}",
        )
    unused = next((file for file in found if file not in matched), None)
    if unused is not None:
        raise RejectedSample(Reason.MALFORMED, f"the record has the member {unused.name!r:.200}, which {key!r} omits")
    return matched
