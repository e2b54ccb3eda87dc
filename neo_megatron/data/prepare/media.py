"""Loads the images of a checked sample, and the frames of its videos, in the form in which a shard stores them."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.image import (
    decode,
    grid_of_size,
    header_size,
    image_grid,
    patches_from_image,
    pixel_limit,
    resize_to_grid,
)
from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.prepare.file_identity import identity_of_content, identity_of_file
from neo_megatron.data.prepare.records import Sample
from neo_megatron.data.prepare.stored_file import MediaFile, StoredFile, identity_of_place, image_bytes
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, replace_tags, split_tags
from neo_megatron.data.video import Clip, plan_clip, read_frames
from neo_megatron.errors import Reason, RejectedSample

# A sample is held in memory until it is written.
MAX_SAMPLE_BYTES = 1 << 30

# The bytes or patches of an image, its grid, and the identity of its file's content; None for a frame of a video.
_Stored = tuple[np.ndarray, tuple[int, int], int | None]


@dataclass(frozen=True)
class Media:
    """The contents of a sample, before its turns are tokenized.

    Args:
        turns: with one ``<image>`` tag for each image and frame. A video of n frames takes the place of its tag as
            ``Frame-1: <image>`` to ``Frame-n: <image>``, one a line.
        images: uint8 [n] each, encoded bytes or flattened patches.
        grids: (height, width) of each in patches.
        identities: (by path, by content) of each image file, then of each video file.
    """

    turns: tuple[Turn, ...]
    images: list[np.ndarray]
    grids: list[tuple[int, int]]
    identities: list[tuple[int, int]]


def load_media(
    sample: Sample, settings: PreprocessConfig
) -> tuple[tuple[Turn, ...], list[np.ndarray], list[tuple[int, int]]]:
    """The turns with one ``<image>`` tag for each image and frame; the images; their grids in patches.

    An image is uint8 [n], encoded bytes or flattened patches. A video of n frames takes the place of its tag as
    ``Frame-1: <image>`` to ``Frame-n: <image>``, one a line. All images and frames share the limit of pixels.

    Raises:
        RejectedSample: for the first that is missing, broken or too large.
        DataError: for a video where PyAV is not installed.
    """
    media = read_media(sample, settings)
    return media.turns, media.images, media.grids


def read_media(sample: Sample, settings: PreprocessConfig) -> Media:
    """As `load_media`, with the identities of the files.

    Raises:
        RejectedSample, DataError: as `load_media`.
    """
    with limited_memory():
        return _read_media(sample, settings)


def _read_media(sample: Sample, settings: PreprocessConfig) -> Media:
    videos = [_video_path(video) for video in sample.videos]
    clips = [plan_clip(path, settings.video_fps, settings.max_frames) for path in videos]
    limit = pixel_limit(
        settings.min_pixels, settings.max_pixels, len(sample.images) + sum(len(clip.times) for clip in clips)
    )
    images, grids, contents, size = [], [], [], 0
    for stored, grid, content in _in_order(sample, clips, settings, limit):
        images.append(stored)
        grids.append(grid)
        if content is not None:
            contents.append(content)
        size += stored.nbytes
        if size > MAX_SAMPLE_BYTES:
            raise RejectedSample(Reason.OVER_LONG, f"the images of the sample take over {MAX_SAMPLE_BYTES >> 20} MiB")
    contents += map(identity_of_file, videos)
    places = map(identity_of_place, (*sample.images, *videos), contents)
    identities = list(zip(places, contents, strict=True))
    return Media(_with_frames(sample.turns, clips), images, grids, identities)


def _in_order(sample: Sample, clips: list[Clip], settings: PreprocessConfig, limit: int) -> Iterator[_Stored]:
    """Yields images and frames in the order of the tags."""
    images, videos = iter(sample.images), iter(clips)
    for turn in sample.turns:
        for tag in split_tags(turn.text)[1::2]:
            if tag == IMAGE_TAG:
                yield _image(next(images), settings, limit)
            else:
                clip = next(videos)
                for frame in read_frames(clip):
                    yield _frame(frame, clip.path, settings, limit)


def _video_path(video: MediaFile) -> str:
    if isinstance(video, StoredFile):
        raise RejectedSample(
            Reason.UNREADABLE_VIDEO,
            f"the video {video} cannot be read in its container; write it into a file of its own",
        )
    return video


def _image(image_file: MediaFile, settings: PreprocessConfig, limit: int) -> _Stored:
    data, path = image_bytes(image_file), str(image_file)
    if settings.image_store == "patches":
        image = decode(data, path)
        grid = image_grid(image, path, settings.min_pixels, limit)
        return patches_from_image(image, grid).reshape(-1), grid, identity_of_content(data)
    if settings.check == "header":
        size = header_size(data, path)
    else:
        image = decode(data, path)
        size = image.height, image.width
    grid = grid_of_size(*size, path, settings.min_pixels, limit)
    return np.frombuffer(data, np.uint8), grid, identity_of_content(data)


def _frame(image: Image.Image, path: str, settings: PreprocessConfig, limit: int) -> _Stored:
    grid = image_grid(image, path, settings.min_pixels, limit)
    if settings.image_store == "patches":
        return patches_from_image(image, grid).reshape(-1), grid, None
    # Lossless and resized to its grid, so that both stores give the model the same pixels.
    file = io.BytesIO()
    resize_to_grid(image, grid).save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), np.uint8), grid, None


def _with_frames(turns: tuple[Turn, ...], clips: list[Clip]) -> tuple[Turn, ...]:
    videos = iter(clips)

    def frames() -> str:
        return "\n".join(f"Frame-{number}: {IMAGE_TAG}" for number in range(1, len(next(videos).times) + 1))

    return tuple(replace(turn, text=replace_tags(turn.text, VIDEO_TAG, frames)) for turn in turns) if clips else turns
