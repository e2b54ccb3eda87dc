"""The configuration of preprocessing: image sizes, image store, video frames, sampling and checks."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from neo_megatron.errors import DataError

ImageCheck = Literal["decode", "header"]
ImageStore = Literal["encoded", "reference", "patches"]
EmptyAnswers = Literal["reject", "keep"]
VideoText = Literal["frames", "timestamps", "images", "frame-timestamps"]
ChatLayout = Literal["neo1_0", "u1"]

TEXT_TOKENS = 3072
"""Of ``sample_tokens``, those that are left to the text of a sample with several images."""


@dataclass(frozen=True)
class PreprocessConfig:
    """All that decides the bytes of a data set in addition to its sources and its tokenizer.

    Args:
        min_pixels, max_pixels: limits of the area of a resized image, in pixels.
        image_store: "encoded" keeps the bytes of the files, "reference" where they lie, "patches" keeps pixels ready
            for the model.
        check: "decode" decodes every image to its end; "header" trusts its header where pixels are not needed.
        seed: of the draw from sources of which only a share is used.
        records_per_shard: records of an annotation file that make one shard.
        video_fps: frames taken per second of a video.
        max_frames: limit for one video; from a longer video so many frames are taken, evenly spaced.
        video_text: "frames" writes ``Frame-1: <image>`` for each frame, and "images" only the tag; "timestamps" the
            length of the video, and the time in front of each frame, as NEO-ov is trained; "frame-timestamps" the same
            with numbers, as its spatial class is asked.
        video_min_pixels, video_max_pixels: limits of each frame of a video, in pixels; 0: those of images, and frames
            share them with the images of their sample.
        empty_answers: whether a sample with a blank answer to train on is rejected, or kept and counted.
        chat_layout: "neo1_0" or "u1", see `neo_megatron.data.chat`; it also decides which records are accepted, and how
            images share the limit of pixels.
        sample_tokens: of layout u1, the longest sample in tokens: several images share them, less `TEXT_TOKENS`.

    Raises:
        DataError: a value is out of its range; the text names the flag.
    """

    min_pixels: int = 65536
    max_pixels: int = 4194304
    image_store: ImageStore = "encoded"
    check: ImageCheck = "decode"
    seed: int = 0
    records_per_shard: int = 8192
    video_fps: float = 1.0
    max_frames: int = 32
    empty_answers: EmptyAnswers = "reject"
    video_text: VideoText = "frames"
    video_min_pixels: int = 0
    video_max_pixels: int = 0
    chat_layout: ChatLayout = "neo1_0"
    sample_tokens: int = 16384

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise DataError(
                f"--min-pixels is {self.min_pixels}: it must be above 0 and at most --max-pixels {self.max_pixels}"
            )
        if self.records_per_shard < 1:
            raise DataError(f"--records-per-shard must be at least 1, not {self.records_per_shard}")
        if not (math.isfinite(self.video_fps) and self.video_fps > 0):
            raise DataError(f"--video-fps must be a number above 0, not {self.video_fps}")
        if self.max_frames < 1:
            raise DataError(f"--max-frames must be at least 1, not {self.max_frames}")
        if min(self.video_min_pixels, self.video_max_pixels) < 0:
            raise DataError(
                "--video-min-pixels and --video-max-pixels must be at least 1, or 0 for the limits of images"
            )
        low, high = self.video_limits
        if low > high:
            raise DataError(f"--video-min-pixels is {low}: it must be at most --video-max-pixels {high}")
        if self.sample_tokens <= TEXT_TOKENS:
            raise DataError(
                f"--sample-tokens is {self.sample_tokens}: it must be above {TEXT_TOKENS}, which are left to the text"
            )

    @property
    def has_video_limits(self) -> bool:
        """Whether frames of videos have limits of their own, in which they do not share those of images."""
        return bool(self.video_min_pixels or self.video_max_pixels)

    @property
    def frames_share(self) -> bool:
        """Whether the images and frames of a sample share one limit of pixels."""
        return self.chat_layout == "neo1_0" and not self.has_video_limits

    @property
    def shared_image_tokens(self) -> int:
        """Tokens that several images of a sample share; 0 if they share twice the pixels of one image."""
        return self.sample_tokens - TEXT_TOKENS if self.chat_layout == "u1" else 0

    @property
    def video_limits(self) -> tuple[int, int]:
        """(least, most) pixels of a frame, before it shares them with others."""
        return self.video_min_pixels or self.min_pixels, self.video_max_pixels or self.max_pixels


@dataclass(frozen=True)
class MediaOptions:
    """The fields of `PreprocessConfig` that a data set may have of its own; ``None`` stands for that of the run.

    Args:
        min_pixels, max_pixels, video_fps, max_frames, video_text, video_min_pixels, video_max_pixels: as there.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_fps: float | None = None
    max_frames: int | None = None
    video_text: VideoText | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None

    def entry(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}
