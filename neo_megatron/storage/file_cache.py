"""A bounded directory of whole files brought from elsewhere, shared by all processes of a machine.

A file appears only whole: it is written aside under a lock, so that one process fetches it while others wait, and
renamed. Those used longest ago are removed when there is no room. A removed file that a process has mapped stays
readable for it, as POSIX has it.
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

_ABANDONED = 3600.0  # seconds after which a half-written file belongs to a process that has died
_TOO_SMALL = 600.0  # a file removed within so many seconds of its last use will soon be wanted again
_USAGE = "usage"
_log = logging.getLogger(__name__)


class FileCache:
    """Files under ``directory``, of ``limit`` bytes at most, but for what is being written by several at once."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit

    def find(self, key: str) -> Path | None:
        """A file that is there, which counts as a use of it."""
        path = self.directory / key
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    @contextmanager
    def adding(self, key: str, size: int) -> Iterator[BinaryIO | None]:
        """A file of ``size`` bytes to fill, which appears at the end; ``None`` where another process has added it.

        Waits for a process that is filling it. Who adds several at once asks for them in the order of their keys.

        Raises:
            DataError: there is no room for it.
        """
        if size > self.limit:
            raise DataError(
                f"{key} has {size:,} bytes, more than the cache in {self.directory} may hold; raise NEO_CACHE_GB"
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
                        f"the disk of {self.directory} is full; free some space, lower NEO_CACHE_GB, "
                        "or name another directory with NEO_CACHE_DIR"
                    ) from error
                raise

    def discard(self, key: str) -> None:
        """Removes a file, if it is there."""
        with suppress(FileNotFoundError):
            path = self.directory / key
            size = path.stat().st_size
            path.unlink()
            self._account(-size)

    def _account(self, size: int) -> None:
        """Adds to the bytes in use, a number that all processes share, and makes room where they are too many."""
        with open(self.directory / _USAGE, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            used = int(text) + size if text.isdigit() else None  # first use, or a half-written number
            if used is None or used > self.limit:
                used = self._make_room()
            file.truncate(0)
            file.write(str(max(used, 0)).encode())

    def _make_room(self) -> int:
        """Removes files until nine tenths of the limit are used, if more is; returns the bytes in use."""
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
                "%s is too small: a file used %d seconds ago had to go; raise NEO_CACHE_GB", self.directory, newest_age
            )
        return used


def _open_locked(path: Path) -> BinaryIO | None:
    """The file next to ``path`` to write to, locked; ``None`` where ``path`` is there, or has appeared meanwhile."""
    partial = str(path) + PARTIAL
    while not path.exists():
        # Not opened to append, which would make writes at a position append too.
        file = open(partial, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o644))  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(partial).st_ino:
                return file
        file.close()  # its writer has finished, or given up
    return None
