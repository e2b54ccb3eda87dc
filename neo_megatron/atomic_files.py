"""Writes files that are either complete or absent: under another name, flushed to disk, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from neo_megatron.errors import DataError

PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(rf".+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


class AtomicFile:
    """A binary file that appears under its name when ``commit`` is called; counts and hashes what is written.

    Attributes:
        path: of the finished file.
        size: bytes written so far.

    Raises:
        DataError: from any method: the file cannot be written. The unfinished file is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        # A unique name: a process that outlives a killed run neither writes into this file nor renames it.
        self._partial = Path(f"{path}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by commit and discard
        except OSError as error:
            raise _refused(path, error) from error

    def write(self, data: Any) -> None:
        """Appends bytes, or anything whose memory is contiguous."""
        self._hash.update(data)
        try:
            self.size += self._file.write(data)
        except OSError as error:
            self.discard()
            raise _refused(self.path, error) from error

    def commit(self) -> dict[str, Any]:
        """Flushes and renames the file; returns its entry in a manifest: ``bytes`` and ``sha256``."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
        except OSError as error:
            self.discard()
            raise _refused(self.path, error) from error
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        """Removes the file unless it was committed."""
        with contextlib.suppress(OSError):  # closing writes buffered bytes, which are not needed any more
            self._file.close()
        self._partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a name is that of an unfinished `AtomicFile`, which a killed process has left."""
    return _PARTIAL_NAME.fullmatch(name) is not None


def _refused(path: Path, error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free space" if full else "correct the cause"
    return DataError(f"{path} cannot be written ({error.strerror}); {remedy}, then run the same command again")


def write_atomically(path: Path, data: Any) -> dict[str, Any]:
    """Writes a file, complete or not at all; returns its entry in a manifest, as `AtomicFile.commit`."""
    file = AtomicFile(path)
    file.write(data)
    return file.commit()


def json_line(entry: dict[str, Any], indent: int | None = None) -> bytes:
    """A line of JSON, UTF-8 and not escaped, except for bytes of paths that are not valid Unicode."""
    return (json.dumps(entry, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def sync_directory(directory: Path) -> None:
    """Flushes renames in a directory to the disk."""
    folder = os.open(directory, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
