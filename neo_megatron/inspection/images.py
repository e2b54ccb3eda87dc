"""Turns a pack's patches back into images for the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Bytes of all images of a page together; beyond that, quality is reduced first, then size.
MAX_IMAGE_BYTES = 6_000_000
_ATTEMPTS = ((1, 88), (1, 70), (1, 45), (2, 60), (4, 60), (8, 60), (16, 50))


@dataclass(frozen=True)
class ShownImage:
    """One image of a pack: uint8 [height, width, 3], and the first of its tokens."""

    pixels: np.ndarray
    first_token: int

    @property
    def rows(self) -> int:
        return self.pixels.shape[0] // 32

    @property
    def columns(self) -> int:
        return self.pixels.shape[1] // 32


def images_of(image: np.ndarray, positions: np.ndarray, patches: np.ndarray) -> list[ShownImage]:
    """The images of a pack, put together from its patches.

    Args:
        image: int32 [T], number of the image of each token, -1 outside.
        positions: int32 [T, 3].
        patches: uint8 [image tokens, 4, 768], see ``docs/shard_format.md``.
    """
    images, first = [], 0
    for number in range(image.max() + 1):
        tokens = np.flatnonzero(image == number)
        rows, columns = (positions[tokens, 1:].max(axis=0) + 1).tolist()
        pixels = pixels_of(patches[first : first + len(tokens)], rows, columns)
        images.append(ShownImage(pixels, int(tokens[0])))
        first += len(tokens)
    return images


def pixels_of(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """uint8 [32 rows, 32 columns, 3] of one image, from patches uint8 [rows * columns, 4, 768]."""
    blocks = patches.reshape(rows, columns, 2, 2, 3, 16, 16)
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * 32, columns * 32, 3)


def jpeg_addresses(images: Sequence[ShownImage], limit: int = MAX_IMAGE_BYTES) -> list[str]:
    """``data:`` addresses of the images, in full size and good quality if all fit into ``limit`` bytes."""
    for shrink, quality in _ATTEMPTS:
        files = [_jpeg(image.pixels, shrink, quality) for image in images]
        if sum(map(len, files)) <= limit:
            break
    return [f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" for file in files]


def _jpeg(pixels: np.ndarray, shrink: int, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).reduce(shrink).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def png_address(levels: np.ndarray, palette: Sequence[tuple[int, int, int, int]]) -> str:
    """A ``data:`` address of uint8 [height, width], whose values are indices of colours (red, green, blue, opacity)."""
    image = Image.fromarray(levels, "P")
    image.putpalette([value for colour in palette for value in colour], "RGBA")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
