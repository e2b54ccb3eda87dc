"""Files that are either complete or absent: written under another name, flushed to disk, then renamed."""

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

    Raises:
        DataError: from any method, where the disk does not take the bytes; nothing of the file is left behind then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        # A name of its own: a process that outlives a killed run neither writes into this file nor renames it.
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
        """Flushes, renames, and returns what a manifest says of the file."""
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
        """Leaves nothing behind; what was committed stays."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which nobody wants any more
            self._file.close()
        self._partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file is what a kill has left of a `AtomicFile`."""
    return _PARTIAL_NAME.fullmatch(name) is not None


def _refused(path: Path, error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free space" if full else "remedy that"
    return DataError(f"{path} cannot be written ({error.strerror}); {remedy}, then run the same command again")


def write_atomically(path: Path, data: Any) -> dict[str, Any]:
    file = AtomicFile(path)
    file.write(data)
    return file.commit()


def json_line(entry: dict[str, Any], indent: int | None = None) -> bytes:
    """Readable in any language; a path that is no Unicode keeps its odd bytes as escapes."""
    return (json.dumps(entry, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def sync_directory(directory: Path) -> None:
    """Brings the renames so far to the disk."""
    folder = os.open(directory, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
