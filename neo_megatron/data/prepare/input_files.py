"""Finds the annotation files of a data set: one file, the matches of a glob, or the files of a directory.

Addresses of object storage follow the rules of paths: a prefix is a directory.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from neo_megatron.checked_files import JSON_BYTES, parse_json, read_json
from neo_megatron.data.prepare.file_kinds import COMPRESSED, FileKind, kind_of_file, plain_name
from neo_megatron.errors import DataError
from neo_megatron.paths import Kind, Wanted, check_path, wrong_kind
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import concurrently, list_directory, read_source, source_state
from neo_megatron.storage.source_files import MissingObject

_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".tar")
# What lies in the directory of a data set besides its files: descriptions, and the marks of the tools that wrote it.
_OTHER = re.compile(
    r"\..*|_.*|readme.*|license.*|notice.*|.*\.md|.*\.crc|dataset_infos?\.json|state\.json", re.IGNORECASE
)
# img2dataset writes 00000.parquet and 00000_stats.json for 00000.tar, Megatron-Energon 00000.tar.idx.
_COMPANIONS = ("_stats.json", ".parquet", ".tar.idx")
_SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval)(?=[-_.]|$)", re.IGNORECASE)


def annotation_files(path: str, where: str = "") -> list[str]:
    """The files of a data set, sorted by name; those of a data set saved by Hugging Face in their own order.

    Args:
        path: a file, a glob, or a directory; or an address of one.
        where: names the flag or data set, for messages.

    Raises:
        DataError: there is no file, or it is not clear which are meant.
    """
    if is_remote(path):
        check_path(path, Wanted.ANNOTATION_FILES, where)
    if _is_directory(path):
        found = _of_directory(path.rstrip("/") if is_remote(path) else str(Path(path)), where)
    elif not glob.has_magic(path) or _exists(path):
        return [path]  # whoever reads it says if it is missing
    else:
        found = _matches_of_address(path, where) if is_remote(path) else sorted(set(glob.glob(path, recursive=True)))
        if not found:
            raise DataError(f"{where} {path} matches no file; correct the pattern".lstrip())
        if directory := next((name for name in found if not is_remote(name) and os.path.isdir(name)), None):
            raise _matches_directory(path, where, directory)
    _check_one_kind(path, found, where)
    _check_one_split(path, found, where)
    return found


def name_of_data_set(path: str, files: Sequence[str]) -> str:
    """The name of the data set at a path: that of its file without suffixes, or of the directory of a glob.

    Args:
        path: or address.
        files: that `annotation_files` found there.
    """
    if not is_remote(path):
        if os.path.isdir(path):
            return Path(path).absolute().name
        is_glob = glob.has_magic(path) and not os.path.exists(path)
        return Path(path).absolute().parent.name if is_glob else Path(plain_name(path)).stem
    if list(files) == [path]:
        return Path(plain_name(path)).stem
    return path.rstrip("/").split("/")[-2 if glob.has_magic(path) else -1]


def _is_directory(path: str) -> bool:
    """Whether a path is a directory; an address is one if it has no object, and is not a pattern."""
    if not is_remote(path):
        return os.path.isdir(path)
    if path.endswith("/") or path.count("/") == 2:
        return True
    return not glob.has_magic(path) and not _exists(path) and any(list_directory(path))


def _exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    try:
        source_state(path)
    except MissingObject:
        return False
    return True


def _of_directory(directory: str, where: str) -> list[str]:
    names, directories = list_directory(directory)
    if "dataset_dict.json" in names:
        held = f"holds the splits {', '.join(directories)}"
        raise _undecided(directory, where, held, _child(directory, "SPLIT"))
    if "state.json" in names and "dataset_info.json" in names:
        return _saved_by_datasets(directory, where)
    files = _without_companions([name for name in names if not _OTHER.fullmatch(name)])
    directories = [name for name in directories if not _OTHER.fullmatch(name)]
    if not files and len(directories) == 1:
        return _of_directory(_child(directory, directories[0]), where)
    named = f"{', '.join(directories[:5])}{' and others' if len(directories) > 5 else ''}"
    if directories:
        held = f"holds {'files and ' if files else ''}the directories {named}"
        raise _undecided(directory, where, held, _child(directory, directories[0]))
    if not files:
        kind = Kind.MISSING if is_remote(directory) else Kind.EMPTY
        raise DataError(f"{where} {wrong_kind(directory, kind, Wanted.ANNOTATIONS)}".lstrip())
    other = next((name for name in files if not plain_name(name).lower().endswith(_SUFFIXES)), None)
    if other is not None:
        held = f"holds {other}, which is not an annotation file"
        raise _undecided(directory, where, held, _child(directory, "*.json"))
    return [_child(directory, name) for name in files]


def _child(directory: str, name: str) -> str:
    return f"{directory}/{name}" if is_remote(directory) else str(Path(directory) / name)


def _saved_by_datasets(directory: str, where: str) -> list[str]:
    """The Arrow files of a data set that ``save_to_disk`` has written, in the order of its rows."""
    state = _json(_child(directory, "state.json"))
    listed = state.get("_data_files")
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in (listed if isinstance(listed, list) else [])
    ]
    if not names or not all(
        isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names
    ):
        raise DataError(
            f"{where} {_child(directory, 'state.json')} does not list files of its directory; save it again".lstrip()
        )
    if state.get("_indices_data_files") or state.get("_format_columns"):
        raise DataError(
            f"{where} {directory} selects rows or columns of its files; save it again after flatten_indices()".lstrip()
        )
    return [_child(directory, str(name)) for name in names]


def _json(path: str) -> dict[str, Any]:
    return parse_json(read_source(path, JSON_BYTES), path) if is_remote(path) else read_json(path)


def _without_companions(names: list[str]) -> list[str]:
    tars = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
    companions = {stem + suffix for stem in tars for suffix in _COMPANIONS}
    return [name for name in names if name not in companions]


def _matches_of_address(pattern: str, where: str) -> list[str]:
    """The objects that match a pattern, sorted; directories are listed one level at a time, those of a level together.

    Raises:
        DataError: the pattern matches a directory too.
    """
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    found: list[str] = []
    level = {"/".join(parts[:first]): _followed({0}, parts[first:])}
    while level:
        for directory, places in level.items():
            if len(parts) - first in places:
                raise _matches_directory(pattern, where, directory)
        listed = concurrently(list_directory, list(level))
        below: dict[str, set[int]] = {}
        for (directory, places), (names, directories) in zip(level.items(), listed, strict=True):
            for name in names:
                if len(parts) - first in _after(places, name, parts[first:]):
                    found.append(_child(directory, name))
            for name in directories:
                if after := _after(places, name, parts[first:]):
                    below[_child(directory, name)] = after
        level = below
    return sorted(found)


def _after(places: set[int], name: str, parts: Sequence[str]) -> set[int]:
    """Places in a pattern after one more name of a path, given those in front of it; 0 is its start."""
    after: set[int] = set()
    for place in places:
        if place == len(parts) or name in (".", ".."):
            continue
        part = parts[place]
        if name.startswith(".") and not part.startswith("."):
            continue
        if part == "**":
            after.add(place)
        elif fnmatchcase(name, part):
            after.add(place + 1)
    return _followed(after, parts)


def _followed(places: set[int], parts: Sequence[str]) -> set[int]:
    """The places, and those after ``**``, which may stand for no name at all."""
    for place in sorted(places):
        while place < len(parts) and parts[place] == "**":
            place += 1
            places.add(place)
    return places


def _matches_directory(path: str, where: str, directory: str) -> DataError:
    return DataError(f"{where} {path} matches the directory {directory}; match files alone".lstrip())


def _check_one_kind(path: str, files: Sequence[str], where: str) -> None:
    kinds: dict[str, str] = {}
    # What is missing or no file is reported when it is read.
    there = [file for file in files if is_remote(file) or os.path.isfile(file)]
    for file, kind in zip(there, concurrently(kind_of_file, there), strict=True):
        kinds.setdefault(_family(kind), file)
    if len(kinds) > 1:
        held = " and ".join(f"{kind} ({os.path.basename(file)})" for kind, file in kinds.items())
        first = next(iter(kinds.values()))
        pattern = f"*{''.join(Path(first).suffixes[-2:])}"
        raise _undecided(path, where, f"holds {held}", _child(os.path.dirname(first), pattern))


def _family(kind: FileKind) -> str:
    if kind in COMPRESSED or kind is FileKind.JSON:
        return "JSON"
    return "Arrow" if kind in (FileKind.ARROW_FILE, FileKind.ARROW_STREAM) else kind.value


def _check_one_split(path: str, files: Iterable[str], where: str) -> None:
    splits = {match[1].lower(): file for file in files if (match := _SPLIT.match(os.path.basename(file)))}
    if len(splits) > 1:
        first, file = next(iter(splits.items()))
        pattern = _child(os.path.dirname(file), f"{first}*")
        raise _undecided(path, where, f"holds the splits {', '.join(sorted(splits))}", pattern)


def _undecided(path: str, where: str, held: str, example: str) -> DataError:
    shown = path if is_remote(path) else str(Path(path))
    return DataError(f"{where} {shown} {held}; name what to read, such as '{example}'".lstrip())
