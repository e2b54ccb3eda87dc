"""Turns images into patches, with the code that made the training data.

Some versions of transformers (4.57, 5.8) copy the files that this one imports and not what those import, so all of
them are named here.
"""

import base64
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs

from .errors_neo import RejectedSample
from .image_limits_neo import check_bytes
from .images_neo import (
    decode,
    decode_opened,
    image_grid,
    normalise,
    patches_from_image,
    pixel_limit,
    read_image,
)
from .tags_neo import split_tags

MERGE_SIZE = 2

# Accepted forms of an image: Pillow's, 8-bit RGB `[height, width, 3]`, the bytes of a file, a path, `file://`,
# base64 with or without `data:`, or as an undecoded image of a data set, {"bytes": ..., "path": ...}.
ImageInput = Image.Image | np.ndarray | bytes | str | os.PathLike | Mapping

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_LONGEST_PATH = 4096


class NEOImagesKwargs(ImagesKwargs, total=False):
    """Options that `from_pretrained` of transformers 5 takes from its arguments."""

    min_pixels: int
    max_pixels: int
    image_grid_thw: bool


class NEOImageProcessor(ImageProcessingMixin):
    """Resizes to multiples of 32 pixels within the limits, normalises by ImageNet's statistics, cuts 16x16 patches.

    Args:
        min_pixels, max_pixels: limits of the area of a resized image.
        image_grid_thw: return the rows and columns of patches as Qwen-VL's processors do, ``image_grid_thw``
            `[images, 3]` in place of ``grid_hw`` `[images, 2]`; TRL's GRPO needs it to split patches between images.
    """

    valid_kwargs = NEOImagesKwargs
    # Saved with its code, so that it loads alone.
    _auto_class = "AutoImageProcessor"

    def __init__(
        self, min_pixels: int = 65536, max_pixels: int = 4194304, image_grid_thw: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.image_grid_thw = image_grid_thw
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels

    @property
    def grid_key(self) -> str:
        return "image_grid_thw" if self.image_grid_thw else "grid_hw"

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", self.grid_key]

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]],
        pictures_in_sample: Sequence[int] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Patches of all images, concatenated.

        Args:
            images: one, several, or a list for each sample.
            min_pixels, max_pixels: in place of the processor's own.
            pictures_in_sample: number of images of every sample, in order; several share twice the limit of one.
                By default the lists of ``images`` are the samples, or all of ``images`` are one.
            return_tensors: "pt"; or ``None`` for lists, of which that of the patches holds NumPy arrays.

        Returns:
            ``pixel_values`` float32 `[patches, 768]`, row-major in each image, and the grids under ``grid_key``.

        Raises:
            ValueError: an image that cannot be read, without colours, or more than 200 times as long as wide.
        """
        check_tensors(return_tensors)
        images = [images] if isinstance(images, ImageInput) else list(images)
        if images and all(isinstance(sample, (list, tuple)) for sample in images):
            pictures_in_sample = (
                [len(sample) for sample in images] if pictures_in_sample is None else pictures_in_sample
            )
            images = [image for sample in images for image in sample]
        if not images:
            raise ValueError("images is empty: give at least one image")
        low, high = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        counts = [len(images)] if pictures_in_sample is None else pictures_in_sample
        together = [count for count in counts for _ in range(count)]
        processed = [
            _patches(image, low, pixel_limit(low, high, count), f"number {number}")
            for number, (image, count) in enumerate(zip(images, together, strict=True), start=1)
        ]
        patches, grids = zip(*processed, strict=True)
        grids = [[*([1] if self.image_grid_thw else []), *grid] for grid in grids]
        if return_tensors is None:
            return BatchFeature({"pixel_values": list(np.concatenate(patches)), self.grid_key: grids})
        patches = torch.from_numpy(np.concatenate(patches))
        return BatchFeature({"pixel_values": patches, self.grid_key: torch.tensor(grids)})

    preprocess = __call__

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what is saved loads without this package."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        write_shared_code(Path(save_directory))
        return saved


def write_shared_code(directory: Path) -> None:
    """Writes the files shared with training, in place of those here that import this package."""
    shared = {
        "errors_neo": RejectedSample,
        "image_limits_neo": check_bytes,
        "images_neo": decode,
        "tags_neo": split_tags,
    }
    for name, part in shared.items():
        text = Path(inspect.getsourcefile(part)).read_text(encoding="utf-8")
        text = re.sub(
            r"^from neo_megatron\.(?:data\.)?(errors|image_limits) import", r"from .\1_neo import", text, flags=re.M
        )
        (directory / f"{name}.py").write_text(text, encoding="utf-8")


def check_tensors(return_tensors: str | None) -> None:
    """Raises ValueError if ``return_tensors`` asks for another kind than PyTorch's tensors or lists."""
    if return_tensors not in ("pt", None):
        raise ValueError(
            f"return_tensors={return_tensors!r}: NEO's processor makes PyTorch tensors, say 'pt', or lists"
        )


def _patches(given: ImageInput, min_pixels: int, max_pixels: int, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        image = _upright(given, name)
        grid = image_grid(image, name, min_pixels, max_pixels)
    except RejectedSample as rejected:
        raise ValueError(rejected.sentence) from rejected
    return row_major(normalise(patches_from_image(image, grid)), *grid), grid


def _upright(image: ImageInput, name: str) -> Image.Image:
    """The RGB image, as the training data would have it."""
    if isinstance(image, Mapping):
        return _of_data_set(image, name)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"the image {name} is a {image.dtype} array {list(image.shape)}: give uint8 [height, width, 3]"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return decode_opened(image, name)
    if isinstance(image, bytes):
        return decode(image, name)
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"the image {name} is a {type(image).__name__}: give a Pillow image or the path of a file")
    return _of_string(os.fspath(image), name)


def _of_data_set(image: Mapping[str, Any], name: str) -> Image.Image:
    """An undecoded `Image` of Hugging Face's datasets; if it has bytes, its path is only a name."""
    data, path = image.get("bytes"), image.get("path")
    if not image.keys() <= {"bytes", "path"} or (data is None and path is None):
        raise ValueError(
            f"the image {name} is a dictionary with the keys {', '.join(map(repr, image))}: give "
            "{'bytes': ..., 'path': ...}, at least one of them"
        )
    return _upright(path, name) if data is None else decode(data, path or name)


def _of_string(place: str, name: str) -> Image.Image:
    if place.startswith("data:"):
        return decode(_decoded_base64(place.partition(",")[2], name), name)
    if place.startswith(("http://", "https://")):
        raise ValueError(f"the image {place} is a URL, and the processor opens files only: download it first")
    if place.startswith("file://"):
        place = unquote(urlsplit(place).path)
    if _BASE64.fullmatch(place) and not (len(place) <= _LONGEST_PATH and os.path.exists(place)):
        try:
            return decode(_decoded_base64(place, name), name)
        except (ValueError, RejectedSample) as error:
            raise ValueError(
                f"the image {place[:60]!r} is neither the path of a file that exists nor an image in base64"
            ) from error
    return decode(read_image(place), place)


def _decoded_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:  # an invalid character, or a wrong number of them
        raise ValueError(f"the image {name} is not valid base64 ({error})") from error


def row_major(blocks: np.ndarray, grid_h: int, grid_w: int) -> np.ndarray:
    """`[image tokens, 4, 768]` -> `[grid_h * grid_w, 768]`: patches in blocks of 2x2 -> row by row of the image."""
    blocks = blocks.reshape(grid_h // MERGE_SIZE, grid_w // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE, -1)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(grid_h * grid_w, -1)
