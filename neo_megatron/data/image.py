"""Pictures -> RGB pixels -> patches, in the arithmetic of the published code, with Pillow and NumPy alone.

A picture of ``grid_h x grid_w`` patches of 16 x 16 pixels makes ``grid_h/2 x grid_w/2`` cells of 2 x 2 patches; a cell
is one token. Patches are uint8 ``[cells, 4, 768]``: cells row-major, in a cell (dy, dx) row-major, values in the order
(channel, y, x).
"""

import io
import math
import os
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from neo_megatron.data.errors import Reason, RejectedSample

PATCH = 16
CELL = 2 * PATCH
PATCH_VALUES = 3 * PATCH * PATCH
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

MAX_FILE_BYTES = 256 << 20
# 134 megapixels: any phone's camera passes, and decoding takes at most about a gigabyte.
MAX_DECODED_PIXELS = 1 << 27
# Formats that Pillow decodes itself. Others are left out because they start programs (EPS) or nobody maintains them.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# EXIF orientation -> how to turn the stored picture so that it stands upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112

Image.init()  # registers the formats that Image.open would otherwise load by guessing


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size, in multiples of ``factor``, to which a picture is resized; its area lies within the limits if possible.

    Raises:
        ValueError: for a picture more than 200 times as long as wide, or wide as long.
    """
    aspect = max(height, width) / min(height, width)
    if aspect > 200:
        raise ValueError(f"absolute aspect ratio must be smaller than 200, got {aspect}")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def pixel_limit(min_pixels: int, max_pixels: int, pictures: int) -> int:
    """``max_pixels`` of each picture of a sample: several share twice the limit of one."""
    return max_pixels if pictures <= 1 else max(max_pixels * 2 // pictures, min_pixels)


def read_picture(path: str) -> bytes:
    """The bytes of a picture file; rejects what is no regular file, or too large, before reading it."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedSample(Reason.MISSING_PICTURE, f"the picture {path} is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise RejectedSample(Reason.DECOMPRESSION_BOMB, f"the picture {path} has over {MAX_FILE_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RejectedSample(Reason.MISSING_PICTURE, f"the picture {path}: {error.strerror}") from error


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in the bytes of a file, as ``to_rgb`` gives it; its size is seen and checked before it is decoded.

    Raises:
        RejectedSample: for what cannot be decoded to the end, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RejectedSample(Reason.DECOMPRESSION_BOMB, f"the picture {name}: {error}") from error
    except UnidentifiedImageError as error:
        raise RejectedSample(
            Reason.UNREADABLE_PICTURE, f"the picture {name} is in none of the formats {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # as in to_rgb
        raise _unreadable(name, error) from error
    return to_rgb(image, name)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An opened picture as a viewer shows it: upright by its EXIF, transparency over white, 16 bits scaled to 8.

    Raises:
        RejectedSample: for what cannot be decoded to the end, or has too many pixels.
    """
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise RejectedSample(
            Reason.DECOMPRESSION_BOMB,
            f"the picture {name} has {image.width} x {image.height} pixels, more than {MAX_DECODED_PIXELS}",
        )
    try:
        return upright_rgb(image)
    # Bytes of strangers make Pillow's decoders raise nearly any type; each means that this picture cannot be shown.
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> RejectedSample:
    sentence = f"the picture {name} cannot be decoded ({type(error).__name__}: {error})"
    return RejectedSample(Reason.UNREADABLE_PICTURE, sentence)


def upright_rgb(image: Image.Image) -> Image.Image:
    """As `to_rgb`, with Pillow's own errors."""
    image.load()
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels that are fractions have no colour")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        image = paper
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def picture_grid(image: Image.Image, name: str, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(grid_h, grid_w) of a decoded picture in patches."""
    try:
        height, width = smart_resize(image.height, image.width, CELL, min_pixels, max_pixels)
    except ValueError as error:
        raise RejectedSample(Reason.ASPECT_RATIO, f"the picture {name}: {error}") from error
    return height // PATCH, width // PATCH


def patches_from_image(image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """Resizes (bicubic) and cuts a decoded picture: uint8 [cells, 4, 768]."""
    size = (grid[1] * PATCH, grid[0] * PATCH)
    return cut_patches(np.asarray(image.resize(size, Image.Resampling.BICUBIC)))


def cut_patches(pixels: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3], both sides multiples of 32 -> uint8 [cells, 4, 768]."""
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    blocks = pixels.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return blocks.reshape(rows * columns, 4, PATCH_VALUES)


def normalise(patches: np.ndarray) -> np.ndarray:
    """uint8 [..., 768] -> float32: scaled to [0, 1], then by ImageNet's mean and deviation of each channel."""
    mean = np.repeat(np.array(IMAGE_MEAN, np.float32), PATCH * PATCH)
    deviation = np.repeat(np.array(IMAGE_STD, np.float32), PATCH * PATCH)
    return (patches.astype(np.float32) / np.float32(255) - mean) / deviation
