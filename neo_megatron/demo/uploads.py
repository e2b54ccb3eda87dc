"""Bounds the directory of uploads."""

import shutil
import threading
from pathlib import Path

_alone = threading.Lock()


def remove_oldest(directory: Path, most: int) -> None:
    """Removes the oldest uploads until the others have at most ``most`` bytes together; the newest one stays.

    Args:
        directory: in which each upload has a directory of its own.
        most: in bytes.
    """
    with _alone:
        uploads = [(path.stat().st_mtime_ns, _size(path), path) for path in directory.iterdir() if path.is_dir()]
        uploads.sort(reverse=True)
        kept = 0
        for number, (_, size, path) in enumerate(uploads):
            kept += size
            if number and kept > most:
                shutil.rmtree(path)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())
