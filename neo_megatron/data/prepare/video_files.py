"""Opens videos that are not local files: members of tars, bytes of Parquet and Arrow, and objects of object storage."""

import io
from dataclasses import dataclass

from neo_megatron.data.prepare.file_identity import identity_of_file, identity_of_stream
from neo_megatron.data.prepare.stored_file import MediaFile
from neo_megatron.data.video import Video
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import open_source
from neo_megatron.storage.source_files import MissingObject, PartStream, SourceFile


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
            data = stored.data
            return PartStream(lambda size, offset: data[offset : offset + size], 0, len(data), str(self)), len(data)
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


class _Part(PartStream):
    """A part of a file that is closed with it."""

    def __init__(self, file: SourceFile, offset: int, length: int) -> None:
        super().__init__(file.pread, offset, length, file.name)
        self._file = file

    def close(self) -> None:
        self._file.__exit__()
        super().close()
