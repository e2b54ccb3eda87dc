"""Finds the annotation files of a data set: one file, the matches of a glob, or the files of a directory."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from neo_megatron.checked_files import read_json
from neo_megatron.data.prepare.file_kinds import COMPRESSED, FileKind, kind_of_file, plain_name
from neo_megatron.errors import DataError, redacted
from neo_megatron.paths import REMOTE, Kind, Wanted, wrong_kind

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
        path: a file, a glob, or a directory.
        where: names the flag or data set, for messages.

    Raises:
        DataError: there is no file, or it is not clear which are meant.
    """
    if path.startswith(REMOTE):
        raise DataError(
            f"{where} {redacted(path)} is object storage; annotations are read from files: copy them".lstrip()
        )
    if os.path.isdir(path):
        found = _of_directory(Path(path), where)
    elif os.path.exists(path) or not glob.has_magic(path):
        return [path]  # whoever reads it says if it is missing
    else:
        found = sorted(set(glob.glob(path, recursive=True)))
        if not found:
            raise DataError(f"{where} {path} matches no file; correct the pattern".lstrip())
        if directory := next((name for name in found if os.path.isdir(name)), None):
            raise DataError(f"{where} {path} matches the directory {directory}; match files alone".lstrip())
    _check_one_kind(path, found, where)
    _check_one_split(path, found, where)
    return found


def _of_directory(directory: Path, where: str) -> list[str]:
    if (directory / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in directory.iterdir() if child.is_dir())
        raise _undecided(directory, where, f"holds the splits {', '.join(splits)}", directory / "SPLIT")
    if (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file():
        return _saved_by_datasets(directory, where)
    children = sorted(child for child in directory.iterdir() if not _OTHER.fullmatch(child.name))
    files = [child for child in children if not child.is_dir()]
    files = _without_companions(files)
    directories = [child.name for child in children if child.is_dir()]
    if not files and len(directories) == 1:
        return _of_directory(directory / directories[0], where)
    named = f"{', '.join(directories[:5])}{' and others' if len(directories) > 5 else ''}"
    if directories:
        held = f"holds {'files and ' if files else ''}the directories {named}"
        raise _undecided(directory, where, held, directory / directories[0])
    if not files:
        raise DataError(f"{where} {wrong_kind(str(directory), Kind.EMPTY, Wanted.ANNOTATIONS)}".lstrip())
    other = next((file.name for file in files if not plain_name(file.name).lower().endswith(_SUFFIXES)), None)
    if other is not None:
        raise _undecided(directory, where, f"holds {other}, which is not an annotation file", directory / "*.json")
    return [str(file) for file in files]


def _saved_by_datasets(directory: Path, where: str) -> list[str]:
    """The Arrow files of a data set that ``save_to_disk`` has written, in the order of its rows."""
    state = read_json(directory / "state.json")
    listed = state.get("_data_files")
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in (listed if isinstance(listed, list) else [])
    ]
    if not names or not all(
        isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names
    ):
        raise DataError(
            f"{where} {directory / 'state.json'} does not list files of its directory; save it again".lstrip()
        )
    if state.get("_indices_data_files") or state.get("_format_columns"):
        raise DataError(
            f"{where} {directory} selects rows or columns of its files; save it again after flatten_indices()".lstrip()
        )
    return [str(directory / name) for name in names]


def _without_companions(files: list[Path]) -> list[Path]:
    tars = {file.name.removesuffix(".tar") for file in files if file.name.endswith(".tar")}
    companions = {stem + suffix for stem in tars for suffix in _COMPANIONS}
    return [file for file in files if file.name not in companions]


def _check_one_kind(path: str, files: Iterable[str], where: str) -> None:
    kinds: dict[str, str] = {}
    for file in filter(os.path.isfile, files):  # what is missing or no file is reported when it is read
        kinds.setdefault(_family(kind_of_file(file)), file)
    if len(kinds) > 1:
        held = " and ".join(f"{kind} ({os.path.basename(file)})" for kind, file in kinds.items())
        first = Path(next(iter(kinds.values())))
        raise _undecided(Path(path), where, f"holds {held}", first.parent / f"*{''.join(first.suffixes[-2:])}")


def _family(kind: FileKind) -> str:
    if kind in COMPRESSED or kind is FileKind.JSON:
        return "JSON"
    return "Arrow" if kind in (FileKind.ARROW_FILE, FileKind.ARROW_STREAM) else kind.value


def _check_one_split(path: str, files: Iterable[str], where: str) -> None:
    splits = {match[1].lower(): file for file in files if (match := _SPLIT.match(os.path.basename(file)))}
    if len(splits) > 1:
        first, file = next(iter(splits.items()))
        pattern = Path(file).parent / f"{first}*"
        raise _undecided(Path(path), where, f"holds the splits {', '.join(sorted(splits))}", pattern)


def _undecided(path: Path, where: str, held: str, example: Path) -> DataError:
    return DataError(f"{where} {path} {held}; name what to read, such as '{example}'".lstrip())
