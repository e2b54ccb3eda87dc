"""Locks unfinished outputs, so that only one process writes to each; a lock ends with its process."""

import fcntl
import os
from pathlib import Path

from neo_megatron.errors import DataError


def lock(path: Path, output: str | Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Opens and locks a file or directory; closing the returned descriptor releases the lock.

    Args:
        path: of a file or directory that exists only while ``output`` is unfinished.
        output: for the message.
        flags: of `os.open`; ``os.O_DIRECTORY`` for a directory.

    Raises:
        DataError: another process holds the lock.
    """
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = path.stat(follow_symlinks=False)
        except FileNotFoundError:  # its owner has just finished, and removed or renamed it
            os.close(descriptor)
            if not flags & os.O_CREAT:
                raise
            continue
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(
                f"another run is writing to {output}; wait until it ends, or choose another --output"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        if os.path.samestat(found, os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
