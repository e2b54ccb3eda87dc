"""Reads untrusted files: only regular files inside their directory and of bounded size, and JSON of bounded depth.

A FIFO or a device in place of a file would block its reader or never end, and a link may lead anywhere. Only the
standard library is needed.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from neo_megatron.errors import DataError

JSON_BYTES = 128 << 20  # the index of a large model and the largest tokenizers have about a quarter of this
_DEPTH = 64
_LONGEST_INTEGER = 40  # digits; transformers writes 10**30 for an unlimited length
_AGAIN = "copy or download it again"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableFile(DataError, ValueError):
    """A file is missing, not a regular file, too large, or not what its name says; the text has a remedy."""


def check_file(path: str | Path, largest: int | None = None) -> int:
    """The size of a regular file in bytes, without opening it.

    Args:
        path: of the file.
        largest: bytes that such a file may have.

    Raises:
        UnreadableFile: it is missing, not a regular file, too large, or a link that leads out of its directory.
    """
    path = Path(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise UnreadableFile(f"{path}: a broken link: copy the file itself there") from error
        if isinstance(error, FileNotFoundError):
            raise UnreadableFile(f"{path}: no such file: give a directory that holds it") from error
        raise UnreadableFile(f"{path}: {getattr(error, 'strerror', error)}: {_AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile(f"{path}: {_KINDS.get(stat.S_IFMT(status.st_mode), 'not a file')}, not a file: {_AGAIN}")
    if path.is_symlink() and not _stays(path):
        raise UnreadableFile(f"{path}: a link that leads out of its directory: copy the file itself there")
    if largest is not None and status.st_size > largest:
        raise UnreadableFile(f"{path}: {status.st_size:,} bytes, such a file has at most {largest:,}: {_AGAIN}")
    return status.st_size


def _stays(path: Path) -> bool:
    """Whether a link leads to a file of its directory or, in the cache of the hub, from a snapshot to a blob."""
    directory, target = path.parent.resolve(), path.resolve()
    model = next((parent for parent in directory.parents if parent.name.startswith("models--")), None)
    in_cache = model is not None and model / "snapshots" in directory.parents and target.parent == model / "blobs"
    return in_cache or directory in target.parents


def read_file(path: str | Path, largest: int) -> bytes:
    """The bytes of a file; errors as `check_file`."""
    check_file(path, largest)
    try:
        # Non-blocking, in case it has become a FIFO since.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}: {_AGAIN}") from error
    if len(content) > largest:
        raise UnreadableFile(f"{path}: more than {largest:,} bytes: {_AGAIN}")
    return content


def read_json(path: str | Path, largest: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Strings are valid Unicode, and nothing is nested deeper than recursive readers can follow.

    Raises:
        UnreadableFile: as `check_file`; the file holds anything else.
    """
    return parse_json(read_file(path, largest), path, largest)


def parse_json(content: bytes, path: str | Path, largest: int = JSON_BYTES) -> dict[str, Any]:
    """As `read_json`, for the bytes of a file that were read already; ``path`` is for messages."""
    if len(content) > largest:
        raise UnreadableFile(f"{path}: more than {largest:,} bytes: {_AGAIN}")
    try:
        value = json.loads(content.decode(), parse_int=_integer)
        _check_values(value)
    except (ValueError, RecursionError) as error:  # too deep, too many digits, no UTF-8, no JSON
        raise UnreadableFile(f"{path}: not JSON ({error}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise UnreadableFile(f"{path}: not a JSON object: {_AGAIN}")
    return value


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _check_values(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} levels deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                item.encode()  # an unpaired surrogate is a UnicodeEncodeError
        level = [item for item in below if isinstance(item, (dict, list, str))]
