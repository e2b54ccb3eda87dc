"""Reads the frames that a video shows at given times, with PyAV (extra ``video``), which the first video imports.

A video is read twice: first without decoding, because its length is taken from its packets, not from the claim of its
header; then it is decoded up to the last frame that is needed.
"""

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from PIL import Image

from neo_megatron.data.image import upright_rgb
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.packages import install

MAX_FILE_BYTES = 8 << 30
# 8192 x 4096: a decoder may hold 17 frames at a time.
MAX_FRAME_PIXELS = 1 << 25
# 36 minutes at 30 frames a second, of 1920 x 1080 pixels.
MAX_FRAMES, MAX_VIDEO_PIXELS = 1 << 16, 1 << 37
# Packets of all streams, and reads or seeks of FFmpeg in one pass over a file. 8 GiB in pieces of 32 KiB, or frames and
# sound that lie far apart, take 400,000 of them; millions of empty boxes would take hours.
MAX_PACKETS, MAX_ACCESSES = 1 << 20, 1 << 20

# (offset, bytes near the start of a file, FFmpeg's demuxer for it). FFmpeg does not choose: these demuxers do not open
# other files or addresses, as those of playlists do.
_READERS = (
    *((4, mark, "mov") for mark in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\0\0\1\xba", "mpeg"),
    (0, b"GIF8", "gif"),
    (188, b"G", "mpegts"),
)
FORMATS = ("MP4", "MOV", "MKV", "WebM", "AVI", "MPEG", "GIF")
# FFmpeg opens no other file or address, and checks sizes before it allocates memory.
OPTIONS = {"protocol_whitelist": "none", "max_pixels": str(MAX_FRAME_PIXELS)}
# Seconds by which times in an intact file may differ: headers are rounded, and some packets show no frame.
_TOLERANCE = Fraction(1, 2)

_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class StoredVideo(Protocol):
    """A video that is not a local file; its text names it in messages."""

    def open(self) -> tuple[io.RawIOBase, int]:
        """Its bytes, which can be read from any place, and their number.

        Raises:
            RejectedSample: it is missing.
        """
        ...


Video = str | StoredVideo
"""A video: the path of a local file, or one that lies elsewhere."""


@dataclass(frozen=True)
class Clip:
    """A video and the times of the frames that are taken from it.

    Args:
        video: the file.
        times: ascending, in seconds since the first frame.
        last: time of the last packet, in seconds.
        end: of the video, in seconds.
    """

    video: Video
    times: tuple[Fraction, ...]
    last: Fraction
    end: Fraction

    @property
    def path(self) -> str:
        """The path or name of the video, for messages."""
        return str(self.video)


def plan_clip(video: Video, fps: float, max_frames: int) -> Clip:
    """Chooses the times of frames: 0, 1/fps, 2/fps, ... to the end of the video.

    If that is more than ``max_frames``, so many are evenly spaced from the first frame to the last.

    Raises:
        RejectedSample: the video is missing, broken or too large.
        DataError: PyAV is not installed.
    """
    with _open(video) as (container, stream):
        last, end = _extent(container, stream, str(video))
    rate = Fraction(str(fps))
    count = max(1, math.ceil(end * rate))
    if count <= max_frames:
        return Clip(video, tuple(number / rate for number in range(count)), last, end)
    return Clip(video, tuple(last * number / max(1, max_frames - 1) for number in range(max_frames)), last, end)


def read_frames(clip: Clip) -> Iterator[Image.Image]:
    """The frame shown at each time of a clip: RGB, upright, with square pixels, transparency over white.

    Raises:
        RejectedSample: the video cannot be decoded up to its last time.
    """
    times = list(reversed(clip.times))
    with _open(clip.video) as (container, stream):
        first, shown, shown_at = None, None, Fraction(0)
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt or number >= 2 * MAX_FRAMES:
                raise _unreadable(clip.path, f"decoding fails at frame {number}")
            _check_size(frame.width, frame.height, clip.path)
            at = _seconds(frame, stream, clip.path)
            first = at if first is None else first
            while shown is not None and times and times[-1] < at - first:
                times.pop()
                yield _image(shown, stream, clip.path)
            if not times:
                return
            shown, shown_at = frame, at - first
        if shown is None or clip.last - shown_at > _TOLERANCE:
            raise _unreadable(clip.path, f"its frames end at {float(shown_at):.1f} of {float(clip.last):.1f} seconds")
        for _ in times:
            yield _image(shown, stream, clip.path)


def _extent(container: Any, stream: Any, path: str) -> tuple[Fraction, Fraction]:
    """(time of the last packet, end of the video) in seconds since the first packet; checks the size of the video."""
    _check_size(stream.codec_context.width, stream.codec_context.height, path)
    frames = packets = 0
    spans: dict[int, list[Fraction]] = {}  # first time, last time and end of each stream
    for packet in container.demux():
        packets += 1
        if packets > MAX_PACKETS:
            raise _unreadable(path, f"it has over {MAX_PACKETS} packets; cut it into clips")
        if packet.size == 0 or packet.is_discard or (packet.pts is None and packet.dts is None):
            continue
        if packet.is_corrupt:
            raise _unreadable(path, "it is cut off")
        start = _seconds(packet, packet.stream, path)
        end = start + (packet.duration or 0) * packet.stream.time_base
        first, last, latest = spans.get(packet.stream_index, (start, start, end))
        spans[packet.stream_index] = [min(first, start), max(last, start), max(latest, end)]
        frames += packet.stream_index == stream.index
        if frames > min(MAX_FRAMES, MAX_VIDEO_PIXELS // (stream.codec_context.width * stream.codec_context.height)):
            raise _unreadable(path, "it is too long; cut it into clips")
    if stream.index not in spans:
        raise _unreadable(path, "it has no frames")
    stated = Fraction(container.duration or 0, 1_000_000)
    found = max(end for _, _, end in spans.values()) - min(first for first, _, _ in spans.values())
    if stated - found > max(_TOLERANCE, stated / 20):
        raise _unreadable(path, f"it ends after {float(found):.1f} of {float(stated):.1f} seconds")
    first, last, end = spans[stream.index]
    return last - first, end - first


def _seconds(timed: Any, stream: Any, path: str) -> Fraction:
    stamp = timed.dts if timed.pts is None else timed.pts
    if stamp is None:
        raise _unreadable(path, "a frame has no time")
    return stamp * stream.time_base


def _check_size(width: int, height: int, path: str) -> None:
    if not 0 < width * height <= MAX_FRAME_PIXELS:
        raise _unreadable(path, f"its frames have {width} x {height} pixels, not 1 to {MAX_FRAME_PIXELS}")


def _image(frame: Any, stream: Any, path: str) -> Image.Image:
    transparent = any(component.is_alpha for component in frame.format.components)
    image = upright_rgb(Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24")))
    shape = stream.sample_aspect_ratio or 1
    if shape != 1:
        width = round(image.width * shape)
        _check_size(width, image.height, path)
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    turn = _UPRIGHT.get(round(frame.rotation / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)


@contextmanager
def _open(video: Video) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream); FFmpeg cannot read anything but this file."""
    path = str(video)
    try:
        import av
    except ImportError as error:
        raise DataError(f"the video {path} needs PyAV: {install('av')}") from error
    try:
        with _counted(video) as file:
            reader = _reader(file.read(256), path)
            file.seek(0)
            try:
                with av.open(file, format=reader, options=OPTIONS) as container:
                    stream = container.streams.best("video")
                    if stream is None or stream.codec_context is None:
                        raise _unreadable(path, "it has no images that FFmpeg decodes")
                    stream.codec_context.thread_count = 1  # one process is one worker
                    yield container, stream
            finally:
                if file.is_exhausted:  # the cause of any other error
                    raise _unreadable(path, f"FFmpeg reads or seeks in it over {MAX_ACCESSES} times to find its frames")
    except (RejectedSample, DataError):
        raise
    # Untrusted bytes make FFmpeg and PyAV raise many types; each means that this video cannot be decoded.
    except Exception as error:
        raise _unreadable(path, getattr(error, "strerror", None) or type(error).__name__) from error


class _CountedFile:
    """A file with a limited number of reads and seeks; then it seems to end, which FFmpeg does not ignore."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._accesses = 0

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def is_exhausted(self) -> bool:
        """Whether the limit is passed."""
        return self._accesses > MAX_ACCESSES

    def read(self, size: int = -1) -> bytes:
        self._accesses += 1
        return b"" if self.is_exhausted else self._file.read(size) or b""

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._accesses += 1
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()


def _counted(video: Video) -> _CountedFile:
    file, size = _regular_file(video) if isinstance(video, str) else video.open()
    if size > MAX_FILE_BYTES:
        file.close()
        raise _unreadable(str(video), f"it has over {MAX_FILE_BYTES >> 30} GiB; cut it into clips")
    return _CountedFile(file)


def _regular_file(path: str) -> tuple[io.RawIOBase, int]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedSample(Reason.MISSING_VIDEO, f"the video {path} is not a regular file; correct its path")
        return io.FileIO(path, "rb"), status.st_size
    except OSError as error:
        raise RejectedSample(
            Reason.MISSING_VIDEO, f"the video {path} cannot be opened ({error.strerror}); correct its path"
        ) from error


def _reader(head: bytes, path: str) -> str:
    for offset, mark, reader in _READERS:
        if head[offset:].startswith(mark):
            return reader
    raise _unreadable(path, f"it is in none of the formats {', '.join(FORMATS)}")


def _unreadable(path: str, why: str) -> RejectedSample:
    return RejectedSample(Reason.UNREADABLE_VIDEO, f"the video {path} cannot be used: {why}")
