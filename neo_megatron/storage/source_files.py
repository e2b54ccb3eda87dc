"""The interface of a file that is read at any place, for sources of a data set, and its local implementation."""

import io
import os
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, Protocol

from neo_megatron.errors import DataError

_BUFFER_BYTES = 1 << 20


class MissingObject(DataError):
    """An object does not exist."""


class ShorterObject(DataError):
    """An object ends before the bytes that were requested."""


class SourceState(NamedTuple):
    """The state of a file, by which a change is noticed.

    Args:
        size: in bytes.
        version: of an object: its ETag, or the time of its last change where the server has no ETags; "" for a local
            file.
        modified_ns: time of the last change of a local file, in nanoseconds; 0 for an object.
    """

    size: int
    version: str = ""
    modified_ns: int = 0

    def entry(self) -> dict[str, Any]:
        """As JSON."""
        changed = {"etag": self.version} if self.version else {"modified_ns": self.modified_ns}
        return {"bytes": self.size, **changed}


class SourceFile(Protocol):
    """An open file. Use it in a ``with`` statement.

    Attributes:
        name: its path or address.
        size: in bytes, now for a local file, when it was first read for an object.
        version: as of `SourceState`.
    """

    name: str
    version: str

    @property
    def size(self) -> int: ...

    def pread(self, size: int, offset: int) -> bytes:
        """The bytes from an offset on; fewer than ``size`` only at the end of the file."""
        ...

    def stream(self) -> BinaryIO:
        """Its bytes from the start as a buffered stream, which is closed with the file."""
        ...

    def will_read(self, end: int) -> None:
        """Says up to which offset the file will be read, so that nothing is requested in advance beyond it."""
        ...

    def check_unchanged(self) -> None:
        """Raises DataError if an object has changed since it was first read."""
        ...

    def __enter__(self) -> "SourceFile": ...

    def __exit__(self, *_: object) -> None: ...


class PartStream(io.RawIOBase):
    """A part of a file as a stream of its own, which may be sent to any place.

    Args:
        pread: as of `SourceFile`.
        offset: in bytes, of the part in the file.
        length: in bytes.
        name: of the file, as of `SourceFile`.
    """

    def __init__(self, pread: Callable[[int, int], bytes], offset: int, length: int, name: str) -> None:
        self.name = name
        self._pread, self._offset, self._length = pread, offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence] + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._length - self._place))
        data = self._pread(size, self._offset + self._place) if size else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class LocalFile:
    """A file of the local disk or of a mounted file system."""

    version = ""

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._descriptor = self._file.fileno()
        self._streams: list[BinaryIO] = []

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def stream(self) -> BinaryIO:
        self._streams.append(open(self.name, "rb", buffering=_BUFFER_BYTES))  # noqa: SIM115 - closed by __exit__
        return self._streams[-1]

    def will_read(self, end: int) -> None:
        pass

    def check_unchanged(self) -> None:
        pass

    def __enter__(self) -> "LocalFile":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, *self._streams):
            file.close()
