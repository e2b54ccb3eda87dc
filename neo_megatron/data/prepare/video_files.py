"""Opens videos that are not local files: members of tars, bytes of Parquet and Arrow, and objects of object storage."""

import io
import os
from dataclasses import dataclass
from typing import Any

from neo_megatron.data.prepare.file_identity import identity_of_file, identity_of_stream
from neo_megatron.data.prepare.stored_file import MediaFile
from neo_megatron.data.video import Video
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import open_source
from neo_megatron.storage.source_files import MissingObject, SourceFile


def video_of(file: MediaFile) -> Video:
    """The video of a record, as `data.video` opens it."""
    return file if isinstance(file, str) and not is_remote(file) else _Stored(file)


@dataclass(frozen=True)
class _Stored:
    """A `data.video.StoredVideo`."""

    file: MediaFile

    def __str__(self) -> str:
        return str(self.file)

    def open(self) -> tuple[io.RawIOBase, int]:
        stored = self.file
        if isinstance(stored, str):
            file = self._opened(stored, "")
            return _Part(file, 0, file.size), file.size
        if stored.data is not None:
            return _Part(_Bytes(str(self), stored.data), 0, len(stored.data)), len(stored.data)
        return _Part(self._opened(stored.container, stored.version), stored.offset, stored.length), stored.length

    def _opened(self, path: str, version: str) -> SourceFile:
        try:
            return open_source(path, version)
        except MissingObject as error:
            raise RejectedSample(Reason.MISSING_VIDEO, f"the video {self} does not exist; correct its path") from error
        except OSError as error:
            raise RejectedSample(
                Reason.MISSING_VIDEO, f"the video {self} cannot be opened ({error.strerror}); correct its path"
            ) from error


def identity_of_video(file: MediaFile) -> int:
    """Identity of a video by its bytes, read in blocks.

    Raises:
        RejectedSample, DataError, OSError: it cannot be read.
    """
    video = video_of(file)
    if isinstance(video, str):
        return identity_of_file(video)
    with video.open()[0] as stream:
        return identity_of_stream(stream)


class _Bytes:
    """The part of a `SourceFile` that `_Part` needs, for bytes in memory."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self._data = name, data

    def pread(self, size: int, offset: int) -> bytes:
        return self._data[offset : offset + size]

    def __exit__(self, *_: object) -> None:
        pass


class _Part(io.RawIOBase):
    """A part of a file as a file of its own, which closes it."""

    def __init__(self, file: SourceFile | _Bytes, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
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
        data = self._file.pread(size, self._offset + self._place) if size else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._file.__exit__()
        super().close()
