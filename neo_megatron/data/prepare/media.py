"""Loads the images of a checked sample, and the frames of its videos, in the form in which a shard stores them."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

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
from neo_megatron.data.prepare.file_identity import identity_of_content
from neo_megatron.data.prepare.records import Sample
from neo_megatron.data.prepare.stored_file import MediaFile, identity_of_place, image_bytes
from neo_megatron.data.prepare.video_files import identity_of_video, video_of
from neo_megatron.data.prepare.video_text import text_of_clip
from neo_megatron.data.shards.references import Reference
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, replace_tags, split_tags
from neo_megatron.data.video import Clip, plan_clip, read_frames
from neo_megatron.errors import Reason, RejectedSample

# A sample is held in memory until it is written.
MAX_SAMPLE_BYTES = 1 << 30
# Of layout u1: up to so many frames share twice the pixels of one image, more have a fixed limit each.
_FEW_FRAMES, _FRAME_PIXELS = 4, 512 * 512


class _Stored(NamedTuple):
    """An image as it is stored.

    Args:
        stored: uint8 [n], its bytes, its patches or the reference to it.
        grid: (height, width) in patches.
        size: bytes that a reader of the sample holds for it.
        content: identity of its file's content; None for a frame of a video.
        video: number of the video of a frame; None for an image.
    """

    stored: np.ndarray
    grid: tuple[int, int]
    size: int
    content: int | None
    video: int | None = None


@dataclass(frozen=True)
class Media:
    """The contents of a sample, before its turns are tokenized.

    Args:
        turns: with one ``<image>`` tag for each image and frame; the lines of `video_text` take the place of the tag of
            a video.
        images: uint8 [n] each, encoded bytes or flattened patches.
        grids: (height, width) of each in patches.
        identities: (by path, by content) of each image file, then of each video file.
        owners: index in ``identities`` of the file of each image and frame.
    """

    turns: tuple[Turn, ...]
    images: list[np.ndarray]
    grids: list[tuple[int, int]]
    identities: list[tuple[int, int]]
    owners: list[int]

    def files(self, part: slice) -> list[tuple[int, int]]:
        """The identities of the files that have an image or a frame in a part of the sample."""
        return [self.identities[number] for number in sorted(set(self.owners[part]))]


def load_media(
    sample: Sample, settings: PreprocessConfig
) -> tuple[tuple[Turn, ...], list[np.ndarray], list[tuple[int, int]]]:
    """The turns with one ``<image>`` tag for each image and frame; the images; their grids in patches.

    An image is uint8 [n], encoded bytes or flattened patches. The lines of `video_text` take the place of the tag of a
    video. All images and frames share the limit of pixels, unless frames have limits of their own or the layout is u1.

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
    if not (sample.images or sample.videos):
        return Media(sample.turns, [], [], [], [])
    with limited_memory():
        return _read_media(sample, settings)


def _read_media(sample: Sample, settings: PreprocessConfig) -> Media:
    clips = [plan_clip(video_of(video), settings.video_fps, settings.max_frames) for video in sample.videos]
    limits = _limits(settings, len(sample.images), sum(len(clip.times) for clip in clips))
    images: list[np.ndarray] = []
    grids: list[tuple[int, int]] = []
    contents: list[int] = []
    owners: list[int] = []
    size = 0
    for image in _in_order(sample, clips, settings, limits):
        images.append(image.stored)
        grids.append(image.grid)
        owners.append(len(contents) if image.video is None else len(sample.images) + image.video)
        if image.content is not None:
            contents.append(image.content)
        size += image.size
        if size > MAX_SAMPLE_BYTES:
            raise RejectedSample(Reason.OVER_LONG, f"the images of the sample take over {MAX_SAMPLE_BYTES >> 20} MiB")
    contents += map(identity_of_video, sample.videos)
    places = map(identity_of_place, (*sample.images, *sample.videos), contents)
    identities = list(zip(places, contents, strict=True))
    return Media(_with_frames(sample.turns, clips, settings), images, grids, identities, owners)


@dataclass(frozen=True)
class _Limits:
    """(least, most) pixels of each image and of each frame of a sample, after they are resized."""

    image: tuple[int, int]
    frame: tuple[int, int]


def _limits(settings: PreprocessConfig, images: int, frames: int) -> _Limits:
    least, most = settings.min_pixels, settings.max_pixels
    if settings.frames_share:
        shared = least, pixel_limit(least, most, images + frames)
        return _Limits(shared, shared)
    of_images = least, pixel_limit(least, most, images, settings.shared_image_tokens)
    if settings.has_video_limits:
        return _Limits(of_images, settings.video_limits)
    of_frames = pixel_limit(least, most, frames) if frames <= _FEW_FRAMES else max(_FRAME_PIXELS, least)
    return _Limits(of_images, (least, of_frames))


def _in_order(sample: Sample, clips: list[Clip], settings: PreprocessConfig, limits: _Limits) -> Iterator[_Stored]:
    """Yields images and frames in the order of the tags."""
    images, videos = iter(sample.images), iter(enumerate(clips))
    for turn in sample.turns:
        for tag in split_tags(turn.text)[1::2]:
            if tag == IMAGE_TAG:
                yield _image(next(images), settings, limits.image)
            else:
                number, clip = next(videos)
                for frame in read_frames(clip):
                    yield _frame(frame, clip.path, settings, limits.frame)._replace(video=number)


def _image(image_file: MediaFile, settings: PreprocessConfig, limits: tuple[int, int]) -> _Stored:
    data, path = image_bytes(image_file), str(image_file)
    if settings.image_store == "patches":
        image = decode(data, path)
        grid = image_grid(image, path, *limits)
        patches = patches_from_image(image, grid).reshape(-1)
        return _Stored(patches, grid, patches.nbytes, identity_of_content(data))
    if settings.check == "header":
        size = header_size(data, path)
    else:
        image = decode(data, path)
        size = image.height, image.width
    grid = grid_of_size(*size, path, *limits)
    stored = np.frombuffer(data, np.uint8)
    if settings.image_store == "reference":
        stored = _reference(image_file, data).pack()
    return _Stored(stored, grid, len(data), identity_of_content(data))


def _reference(image_file: MediaFile, data: bytes) -> Reference:
    if isinstance(image_file, str):
        return Reference.to(image_file, 0, data)
    if image_file.data is not None:
        raise RejectedSample(
            Reason.UNREADABLE_IMAGE,
            f"the image {image_file} has no bytes of its own in a file, to which --image-store reference could refer; "
            "use --image-store encoded",
        )
    return Reference.to(image_file.container, image_file.offset, data)


def _frame(image: Image.Image, path: str, settings: PreprocessConfig, limits: tuple[int, int]) -> _Stored:
    if settings.image_store == "reference":
        raise RejectedSample(
            Reason.UNREADABLE_VIDEO,
            f"the frames of the video {path} have no bytes of their own, to which --image-store reference could refer; "
            "use --image-store encoded",
        )
    grid = image_grid(image, path, *limits)
    if settings.image_store == "patches":
        patches = patches_from_image(image, grid).reshape(-1)
        return _Stored(patches, grid, patches.nbytes, None)
    # Lossless and resized to its grid, so that both stores give the model the same pixels.
    file = io.BytesIO()
    resize_to_grid(image, grid).save(file, "PNG", compress_level=1)
    stored = np.frombuffer(file.getvalue(), np.uint8)
    return _Stored(stored, grid, stored.nbytes, None)


def _with_frames(turns: tuple[Turn, ...], clips: list[Clip], settings: PreprocessConfig) -> tuple[Turn, ...]:
    if not clips:
        return turns
    texts = iter([text_of_clip(clip, settings.video_text) for clip in clips])
    return tuple(replace(turn, text=replace_tags(turn.text, VIDEO_TAG, lambda: next(texts))) for turn in turns)
