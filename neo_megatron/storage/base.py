"""The interface for reading a data set from a local directory or object storage, and its local implementation."""

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
    """The bytes of one file, sliced like an array; a mapped file is an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Range(NamedTuple):
    """``size`` bytes of a file, from ``offset`` on."""

    content: Content
    offset: int
    size: int


class Directory(Protocol):
    """A flat directory of files that never change once its manifest exists.

    Attributes:
        location: its path or address.
    """

    location: str

    def read(self, name: str) -> bytes:
        """The bytes of a small file. Raises DataError if it is missing."""
        ...

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, ``None`` if it is missing."""
        ...

    def local(self, name: str) -> Path:
        """The path of a complete file on the local disk. Raises DataError if it is not an existing regular file."""
        ...

    def map(self, name: str, size: int | None = None) -> np.ndarray:
        """A complete mapped file, uint8 [n]. Raises DataError if it does not have ``size`` bytes."""
        ...

    def open(self, name: str, size: int) -> Content:
        """A file of which parts are read: mapped on the local disk, requested part by part from object storage."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> np.ndarray:
        """A part of a file, uint8 [size]."""
        ...

    def read_ranges(self, ranges: Sequence[Range]) -> list[np.ndarray]:
        """Parts of files that ``open`` returned, uint8 [size] each; requests are concurrent."""
        ...

    def prepare(self, files: Iterable[tuple[str, int]]) -> None:
        """Fetches files of the given names and sizes to the local disk concurrently, so that ``map`` need not wait."""
        ...


class LocalDirectory:
    """A directory of the local disk or of a mounted file system; all arrays are views of mapped files."""

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
    """Whether a location is an address of object storage."""
    return isinstance(location, str) and location.startswith(_SCHEMES)


def join(location: str | Path, relative: str) -> str:
    """Resolves a path relative to a location, for local paths and for object storage.

    Raises:
        DataError: it leads out of the bucket.
    """
    if not is_remote(location) or is_remote(relative):
        return relative if is_remote(relative) else os.path.join(location, relative)
    scheme, path = str(location).split("://", 1)
    joined = posixpath.normpath(posixpath.join(path, relative))
    if joined.split("/")[0] != path.split("/")[0]:
        raise DataError(
            f"{relative} leads out of the bucket of {location}; pack with the shards in a directory next to the packs, "
            "and upload both"
        )
    return f"{scheme}://{joined}"


def regular_file(path: str) -> os.stat_result:
    """The status of a file of a data set, which must be a regular file: opening a FIFO could block forever.

    Raises:
        DataError: it is missing, a broken link, or not a regular file.
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
    """A mapped file, uint8 [n]; the map exists as long as any view of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # An empty file, which a shard without images has, cannot be mapped.
        if not os.fstat(descriptor).st_size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(descriptor)


def read_ahead(mapped: np.ndarray, rows: np.ndarray) -> None:
    """Requests the pages of some rows of a mapped array at once, instead of waiting for the disk at each of them.

    Args:
        mapped: an array, or a view of one, that `map_file` returned; other arrays are ignored.
        rows: int [n], indices of rows.
    """
    source: object = mapped
    while isinstance(source, np.ndarray | memoryview):
        source = source.base if isinstance(source, np.ndarray) else source.obj
    if not isinstance(source, mmap.mmap):
        return
    first = mapped.ctypes.data - np.frombuffer(source, np.uint8).ctypes.data
    source.madvise(mmap.MADV_RANDOM)  # pages around a row are not needed
    for page in np.unique((first + rows * mapped.itemsize) // mmap.PAGESIZE).tolist():
        source.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)
