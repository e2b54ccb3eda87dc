"""A cache directory of bounded size for complete files from object storage, shared by all processes of a machine.

A file appears only when it is complete: it is written under another name and a lock, so that one process fetches it
while others wait, and then renamed. The least recently used files are removed when there is no room. A process that has
mapped a removed file can still read it, as POSIX guarantees.
"""

import errno
import fcntl
import heapq
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from neo_megatron.atomic_files import PARTIAL
from neo_megatron.errors import DataError

_ABANDONED = 3600.0  # seconds after which an incomplete file is that of a process that has died
_TOO_SMALL = 600.0  # seconds: a file removed so soon after its last use will be needed again
_USAGE = "usage"
_log = logging.getLogger(__name__)


class FileCache:
    """Files in ``directory`` with at most ``limit`` bytes, which concurrent writers may exceed for a moment."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit

    def find(self, key: str) -> Path | None:
        """The path of a file, which counts as a use of it; ``None`` if it is not in the cache."""
        path = self.directory / key
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    @contextmanager
    def adding(self, key: str, size: int) -> Iterator[BinaryIO | None]:
        """Opens a file of ``size`` bytes to fill, which appears at the end; ``None`` if another process has added it.

        Waits for a process that is filling it. To avoid deadlocks, several files are opened in the order of their keys.

        Raises:
            DataError: there is no room for it.
        """
        if size > self.limit:
            raise DataError(
                f"{key} has {size:,} bytes, more than the {self.limit:,} of the cache in {self.directory}; raise "
                "NEO_CACHE_GB"
            )
        path = self.directory / key
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        if file is None:
            yield None
            return
        with file:
            try:
                file.truncate(size)
                self._account(size)
                yield file
                os.fdatasync(file.fileno())
                os.replace(file.name, path)
            except BaseException as error:
                os.unlink(file.name)
                self._account(-size)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"the disk of the cache {self.directory} is full; free some space, lower NEO_CACHE_GB, "
                        "or set NEO_CACHE_DIR to another directory"
                    ) from error
                raise

    def discard(self, key: str) -> None:
        """Removes a file if it exists."""
        with suppress(FileNotFoundError):
            path = self.directory / key
            size = path.stat().st_size
            path.unlink()
            self._account(-size)

    def _account(self, size: int) -> None:
        """Adds to the number of bytes in use, which all processes share, and makes room if they exceed the limit."""
        with open(self.directory / _USAGE, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            used = int(text) + size if text.isdigit() else None  # first use, or an incomplete number
            if used is None or used > self.limit:
                used = self._make_room()
            file.truncate(0)
            file.write(str(max(used, 0)).encode())

    def _make_room(self) -> int:
        """If the limit is exceeded, removes files down to 90% of it; returns the bytes in use."""
        used, oldest = 0, []
        for path in self.directory.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.name == _USAGE or not path.is_file():
                    continue
                used += status.st_size
                age = time.time() - status.st_mtime
                if path.suffix != PARTIAL or age > _ABANDONED:
                    oldest.append((-age, status.st_size, path))
        if used <= self.limit:
            return used
        heapq.heapify(oldest)
        newest_age = float("inf")
        while oldest and used > self.limit * 0.9:
            age, size, path = heapq.heappop(oldest)
            newest_age = min(newest_age, -age)
            path.unlink(missing_ok=True)
            used -= size
        if newest_age < _TOO_SMALL:
            _log.warning(
                "the cache %s is too small: it removed a file that was used %d seconds ago; raise NEO_CACHE_GB",
                self.directory,
                newest_age,
            )
        return used


def _open_locked(path: Path) -> BinaryIO | None:
    """The locked file next to ``path`` to write to; ``None`` if ``path`` exists, or has appeared meanwhile."""
    partial = str(path) + PARTIAL
    while not path.exists():
        # Not opened in append mode, in which writes at a position would append too.
        file = open(partial, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o644))  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(partial).st_ino:
                return file
        file.close()  # its writer has finished or given up
    return None
