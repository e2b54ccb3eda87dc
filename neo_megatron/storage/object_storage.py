"""A directory in object storage: complete files are read through a cache, parts of files by range requests."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from neo_megatron.errors import DataError
from neo_megatron.storage.base import MANIFEST, Range, map_file
from neo_megatron.storage.object_requests import connection
from neo_megatron.storage.source_files import MissingObject, ShorterObject

_CHUNK = 8 << 20  # bytes of a request when a complete file is fetched
_GAP = 1 << 16  # bytes: up to such a gap, one request for two ranges costs less than two
_MERGED = 16 << 20  # bytes up to which ranges share a request: more of them come sooner in several
_LARGE = 256 << 20  # bytes from which fetching shows a progress bar
_MOST_FILES = 256  # fetched at the same time, each of which is an open file


class ObjectFile:
    """One object, whose slices are requested on access."""

    def __init__(self, directory: "ObjectDirectory", name: str, size: int) -> None:
        self._directory, self.name, self._size = directory, name, size
        self.address = directory.address_of(name)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._size)
        return self._directory.read_range(self.name, start, max(stop - start, 0))


class ObjectDirectory:
    """A `storage.base.Directory`. It holds only names, so it can be pickled and survives a fork.

    Args:
        location: ``s3://bucket/prefix`` or ``msc://profile/prefix``.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self._version = ""

    def read(self, name: str) -> bytes:
        return self.map(name).tobytes()

    def size(self, name: str) -> int | None:
        try:
            return self._information(name).content_length
        except MissingObject:
            with suppress(MissingObject):
                self._request(name, 0, 1)  # its answer tells a missing bucket from a missing object
            return None

    def local(self, name: str) -> Path:
        return self._cached(name, None)

    def map(self, name: str, size: int | None = None) -> np.ndarray:
        for _ in range(3):
            with suppress(FileNotFoundError):  # another process may remove the file before it is mapped
                array = map_file(self._cached(name, size))
                if size is None or len(array) == size:
                    return array
                connection().cache.discard(self._key(name))
        raise DataError(
            f"{self.address_of(name)} does not stay in the cache {connection().cache.directory}; raise NEO_CACHE_GB"
        )

    def open(self, name: str, size: int) -> ObjectFile:
        return ObjectFile(self, name, size)

    def read_range(self, name: str, offset: int, size: int) -> np.ndarray:
        return self._request(name, offset, size)

    def read_ranges(self, ranges: Sequence[Range]) -> list[np.ndarray]:
        return read_ranges(ranges)

    def prepare(self, files: Iterable[tuple[str, int]]) -> None:
        cache = connection().cache
        missing = sorted({(self._key(name), name, size) for name, size in files if not cache.find(self._key(name))})
        while missing:
            # Together they must fit into the cache with the files that other processes are fetching.
            count, total = 1, missing[0][2]
            while count < min(len(missing), _MOST_FILES) and total + missing[count][2] <= cache.limit // 8:
                total += missing[count][2]
                count += 1
            self._fetch(missing[:count])
            missing = missing[count:]

    def _fetch(self, files: Sequence[tuple[str, str, int]]) -> None:
        """Fetches files, given as (key, name, size), into the cache."""
        with ExitStack() as stack:
            chunks: list[_Chunk] = []
            for key, name, size in files:
                file = stack.enter_context(connection().cache.adding(key, size))
                starts = range(0, size, _CHUNK) if file is not None else ()
                chunks += [_Chunk(file, name, start, min(_CHUNK, size - start), size) for start in starts]
            total = sum(chunk.size for chunk in chunks)
            bar = tqdm(total=total, desc=f"fetch {self.location}", unit="B", unit_scale=True, disable=total < _LARGE)
            with bar:
                connection().map(lambda chunk: bar.update(self._fetch_chunk(chunk)), chunks)

    def _fetch_chunk(self, chunk: "_Chunk") -> int:
        ends = chunk.offset + chunk.size == chunk.file_size
        os.pwrite(chunk.file.fileno(), self._request(chunk.name, chunk.offset, chunk.size, ends), chunk.offset)
        return chunk.size

    def _request(self, name: str, offset: int, size: int, ends: bool = False) -> np.ndarray:
        """Part of an object; if it ``ends`` there, a longer object is an error too."""
        if not size:
            return np.empty(0, np.uint8)

        def read() -> np.ndarray:
            data = connection().read(self.address_of(name), offset, size + ends)
            if len(data) != size:
                found = self._information(name).content_length
                if found < offset + size or (ends and found > offset + size):
                    raise ShorterObject(
                        f"{self.address_of(name)} has {found} bytes, not what its manifest says; copy it again"
                    )
                raise ConnectionError(f"{len(data)} bytes came instead of {size}")
            return np.frombuffer(data, np.uint8)

        return connection().repeat(read, self.address_of(name))

    def _information(self, name: str) -> Any:
        """Size and ETag of an object. Raises MissingObject if it does not exist."""
        url = self.address_of(name)
        found = connection().repeat(lambda: connection().information(url), url)
        if name == MANIFEST:
            self._version = found.etag or str(found.last_modified)
        return found

    def _cached(self, name: str, size: int | None) -> Path:
        path = connection().cache.find(self._key(name))
        if path is None:
            self.prepare([(name, self._information(name).content_length if size is None else size)])
            path = connection().cache.directory / self._key(name)
        return path

    def _key(self, name: str) -> str:
        """The key of a file in the cache, with the version of the manifest: it lists all files and is written last."""
        if not self._version:
            self._information(MANIFEST)
        digest = hashlib.sha256(f"{self.location} {self._version}".encode()).hexdigest()[:32]
        return f"{digest}/{Path(name).name}"

    def address_of(self, name: str) -> str:
        """The address of a file."""
        return f"{self.location}/{name}"


def read_ranges(ranges: Sequence[Range]) -> list[np.ndarray]:
    """Parts of mapped files and of objects of any directories, uint8 [size] each; requests are concurrent.

    Raises:
        MissingObject: an object does not exist.
        ShorterObject: an object ends before a range.
        DataError: an object cannot be read.
    """
    requests = _merged(ranges)
    blocks = connection().map(lambda wanted: wanted.file[wanted.start : wanted.stop], requests)
    parts = {
        number: content[offset : offset + size]
        for number, (content, offset, size) in enumerate(ranges)
        if isinstance(content, np.ndarray)
    }
    for wanted, block in zip(requests, blocks, strict=True):
        for number in wanted.ranges:
            start = ranges[number].offset - wanted.start
            parts[number] = block[start : start + ranges[number].size]
    return [parts[number] for number in range(len(ranges))]


def object_at(address: str, size: int) -> ObjectFile:
    """An object of at least ``size`` bytes, for `read_ranges`; nothing is requested."""
    directory, _, name = address.rpartition("/")
    return ObjectFile(ObjectDirectory(directory), name, size)


class _Chunk(NamedTuple):
    """A part of a file that is fetched completely."""

    file: BinaryIO
    name: str
    offset: int
    size: int
    file_size: int


class _Wanted(NamedTuple):
    """The bytes of one request, and the numbers of the ranges within them."""

    file: ObjectFile
    start: int
    stop: int
    ranges: list[int]


def _merged(ranges: Sequence[Range]) -> list[_Wanted]:
    """Requests for all ranges that are not mapped; neighbouring ranges of a file share one."""
    merged: list[_Wanted] = []
    of_objects = [
        (part.content, part.offset, part.size, number)
        for number, part in enumerate(ranges)
        if isinstance(part.content, ObjectFile)
    ]
    for file, offset, size, number in sorted(of_objects, key=lambda wanted: (wanted[0].address, wanted[1])):
        last = merged[-1] if merged else None
        is_near = last and last.file.address == file.address and offset - last.stop <= _GAP
        if last and is_near and offset + size - last.start <= _MERGED:
            merged[-1] = last._replace(stop=max(last.stop, offset + size), ranges=[*last.ranges, number])
        else:
            merged.append(_Wanted(file, offset, offset + size, [number]))
    return merged
