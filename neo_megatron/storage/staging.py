"""Local room for files on their way to object storage: a directory of ``TMPDIR`` for each user and address.

A run locks it, so two runs of one machine do not write to one address, and clears what a killed run has left in it.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from neo_megatron.errors import DataError
from neo_megatron.locks import lock


class Staging:
    """The locked, empty staging directory of an address.

    Attributes:
        directory: its path.

    Raises:
        DataError: another run holds it, or another user made it.
    """

    def __init__(self, location: str) -> None:
        location = location.rstrip("/")
        self.directory = staging_directory(location)
        while True:
            try:
                self._lock = lock(self.directory, location, os.O_RDONLY | os.O_DIRECTORY)
                break
            except FileNotFoundError:  # another run has just ended
                staging_directory(location)
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def close(self) -> None:
        """Removes the directory with its files, and releases the lock."""
        shutil.rmtree(self.directory)
        os.close(self._lock)


def staging_path(location: str) -> Path:
    """The path of the staging directory of an address, which does not end with a slash."""
    name = hashlib.sha256(f"{os.getuid()} {location}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"neo-megatron-{name}"


def staging_directory(location: str) -> Path:
    """The staging directory of an address, which is made if it is missing.

    Raises:
        DataError: another user made it.
    """
    directory = staging_path(location)
    directory.mkdir(mode=0o700, exist_ok=True)
    # Everyone may write to /tmp: a directory of another user, or a link, could lead these files anywhere.
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DataError(f"{directory} belongs to another user; remove it, or set TMPDIR to a directory of your own")
    return directory
