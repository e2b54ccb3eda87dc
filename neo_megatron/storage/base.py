"""Where a data set lies: a directory of the local disk, or a prefix in object storage, behind one interface."""

import mmap
import os
import posixpath
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from neo_megatron.errors import DataError

MANIFEST = "manifest.json"  # written last: a directory that has one is complete
_SCHEMES = ("s3://", "msc://")


class Content(Protocol):
    """The bytes of one file. A mapped file is an array, which is this too."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Range(NamedTuple):
    """``size`` bytes of a file from ``offset`` on."""

    content: Content
    offset: int
    size: int


class Directory(Protocol):
    """A flat directory of files that are never changed once its manifest is there."""

    location: str

    def read(self, name: str) -> bytes:
        """A whole small file. Raises DataError where it is not there."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, or ``None`` where it is not there."""
        ...

    def local(self, name: str) -> Path:
        """A whole file on the local disk. Raises DataError where it is not a regular file that is there."""
        ...

    def map(self, name: str, size: int | None = None) -> np.ndarray:
        """A whole file as uint8 [n], mapped. Raises DataError where it is not ``size`` bytes long."""
        ...

    def open(self, name: str, size: int) -> Content:
        """A file of which parts are wanted: mapped on the local disk, requested part by part elsewhere."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> np.ndarray:
        """A part of a file, uint8 [size]."""
        ...

    def read_ranges(self, ranges: Sequence[Range]) -> list[np.ndarray]:
        """Parts of files that ``open`` returned, uint8 [size] each; those that need requests all at the same time."""
        ...

    def prepare(self, files: Iterable[tuple[str, int]]) -> None:
        """Brings files of the given names and sizes to the local disk, all at once, so that ``map`` need not wait."""
        ...


class LocalDirectory:
    """A directory of the local disk, or of a mounted file system. All that is read are views of mapped files."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)

    def read(self, name: str) -> bytes:
        return self.local(name).read_bytes()

    def size(self, name: str) -> int | None:
        path = os.path.join(self.location, name)
        return regular_file(path).st_size if os.path.lexists(path) else None

    def local(self, name: str) -> Path:
        path = os.path.join(self.location, name)
        regular_file(path)
        return Path(path)

    def map(self, name: str, size: int | None = None) -> np.ndarray:
        path = os.path.join(self.location, name)
        found = regular_file(path).st_size
        if size is not None and found != size:
            raise DataError(f"{path} has {found} bytes, not {size}; copy or preprocess it again")
        return map_file(path)

    def open(self, name: str, size: int) -> np.ndarray:
        return self.map(name, size)

    def read_range(self, name: str, offset: int, size: int) -> np.ndarray:
        return self.map(name)[offset : offset + size]

    def read_ranges(self, ranges: Sequence[Range]) -> list[np.ndarray]:
        return [content[offset : offset + size] for content, offset, size in ranges]

    def prepare(self, files: Iterable[tuple[str, int]]) -> None:
        pass


def is_remote(location: str | Path) -> bool:
    return isinstance(location, str) and location.startswith(_SCHEMES)


def join(location: str | Path, relative: str) -> str:
    """The place that ``relative`` names as seen from ``location``, both for local paths and for object storage.

    Raises:
        DataError: it leads out of the bucket.
    """
    if not is_remote(location) or is_remote(relative):
        return relative if is_remote(relative) else os.path.join(location, relative)
    scheme, path = str(location).split("://", 1)
    joined = posixpath.normpath(posixpath.join(path, relative))
    if joined.split("/")[0] != path.split("/")[0]:
        raise DataError(
            f"{relative} leads out of the bucket of {location}; pack where the shards lie next to the packs"
        )
    return f"{scheme}://{joined}"


def regular_file(path: str) -> os.stat_result:
    """What the file system says of a file of a data set. To open a FIFO could take for ever, and a device does things.

    Raises:
        DataError: it is missing, a link to nothing, a directory, or not a regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; copy or preprocess it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy or preprocess it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file; copy or preprocess it again")
    return status


def map_file(path: str | Path) -> np.ndarray:
    """A file as uint8 [n]; the map lives as long as a view of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # An empty file cannot be mapped; a shard without an image has one.
        if not os.fstat(descriptor).st_size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(descriptor)


def read_ahead(mapped: np.ndarray, rows: np.ndarray) -> None:
    """Asks for the pages of some rows of a mapped array all at once, in place of waiting for the disk at each of them.

    Args:
        mapped: an array that views a file of `map_file`.
        rows: int [n], numbers of rows.
    """
    source: object = mapped
    while isinstance(source, np.ndarray | memoryview):
        source = source.base if isinstance(source, np.ndarray) else source.obj
    if not isinstance(source, mmap.mmap):
        return
    first = mapped.ctypes.data - np.frombuffer(source, np.uint8).ctypes.data
    source.madvise(mmap.MADV_RANDOM)  # what lies around a row is of no use
    for page in np.unique((first + rows * mapped.itemsize) // mmap.PAGESIZE).tolist():
        source.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)
