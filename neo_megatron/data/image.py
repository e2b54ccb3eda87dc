"""Decodes images to RGB pixels and cuts them into patches, with the arithmetic of the published code.

Only Pillow and NumPy are needed.

An image of ``grid_h x grid_w`` patches of 16 x 16 pixels makes ``grid_h/2 x grid_w/2`` image tokens of 2 x 2 patches
each. Patches are uint8 ``[image tokens, 4, 768]``: image tokens row by row, the four patches of each in the order
(dy, dx), values in the order (channel, y, x).
"""

import io
import math
import os
import stat
import zlib

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from neo_megatron.data.image_limits import MAX_FILE_BYTES, TooCostly, check_bytes, check_opened, without_end
from neo_megatron.errors import Reason, RejectedSample

PATCH = 16
IMAGE_TOKEN_SIDE = 2 * PATCH  # pixels
PATCH_VALUES = 3 * PATCH * PATCH
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# Formats that Pillow decodes itself. Others are left out because they start programs (EPS) or nobody maintains them.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# EXIF orientation -> how to turn the stored image so that it stands upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION_TAG = 0x0112
_BITS_TAG, _COMPRESSION_TAG, _PHOTOMETRIC_TAG, _FILL_ORDER_TAG, _PLANAR_TAG = 0x0102, 0x0103, 0x0106, 0x010A, 0x011C
_COLORMAP_TAG, _INK_SET_TAG, _SAMPLE_FORMAT_TAG, _SUBSAMPLING_TAG = 0x0140, 0x014C, 0x0153, 0x0212
# Text chunks that may hold the orientation; Pillow refuses compressed ones of over a megabyte.
_PNG_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_MAX_ORIENTATION_TEXT = 64 << 20
_STRIP_PIXELS = 1 << 20

Image.init()  # registers all formats, which Image.open would otherwise load one by one


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) to which an image is resized: multiples of ``factor``, if possible with an area within limits.

    Raises:
        ValueError: one side of the image is more than 200 times as long as the other.
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


def pixel_limit(min_pixels: int, max_pixels: int, images: int, tokens: int = 0) -> int:
    """The ``max_pixels`` of each image of a sample.

    Several images share twice the limit of one; or, with ``tokens``, each has a share of so many image tokens, and no
    more pixels than an image alone.
    """
    if images <= 1:
        return max_pixels
    shared = min(max_pixels, tokens * IMAGE_TOKEN_SIDE**2 // images) if tokens else max_pixels * 2 // images
    return max(shared, min_pixels)


def read_image(path: str) -> bytes:
    """The bytes of an image file.

    Raises:
        RejectedSample: it is missing, not a regular file or too large, which is found before it is read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedSample(Reason.MISSING_IMAGE, f"the image {path} is not a regular file; correct its path")
        if status.st_size > MAX_FILE_BYTES:
            raise RejectedSample(
                Reason.DECOMPRESSION_BOMB, f"the image {path} has over {MAX_FILE_BYTES >> 20} MiB; reduce it"
            )
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RejectedSample(
            Reason.MISSING_IMAGE, f"the image {path} cannot be opened ({error.strerror}); correct its path"
        ) from error


def decode(data: bytes, name: str) -> Image.Image:
    """The image in the bytes of a file, as `upright_rgb` returns it; its cost is checked before it is decoded.

    Args:
        data: of the file.
        name: of the image, for messages.

    Raises:
        RejectedSample: it cannot be decoded to its end, or is beyond the limits of `image_limits`.
    """
    try:
        data = without_end(data)
    except ValueError as error:
        raise _unreadable(name, error) from error
    return _shown(_open(data, name), name)


def decode_opened(image: Image.Image, name: str) -> Image.Image:
    """An image that Pillow has opened, and may not have read yet, as `upright_rgb` returns it.

    Raises:
        RejectedSample: it cannot be decoded to its end, or is beyond the limits of `image_limits`.
    """
    # Without a file it has been read already; a deep or pickled copy does not even have the attribute.
    if isinstance(image, ImageFile.ImageFile) and getattr(image, "fp", None) is not None:
        try:
            data = _file_of(image)
            check_bytes(data)
            check_opened(image, data)
        except TooCostly as error:
            raise _too_costly(name, error) from error
        except Exception as error:  # such as a file that was closed
            raise _unreadable(name, error) from error
    return _shown(image, name)


def _file_of(image: ImageFile.ImageFile) -> bytes:
    """The bytes that an image is read from; the position of its file is restored."""
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read(MAX_FILE_BYTES + 1)
    image.fp.seek(place)
    if len(data) > MAX_FILE_BYTES:
        raise TooCostly(f"has over {MAX_FILE_BYTES >> 20} MiB")
    return data


def _shown(image: Image.Image, name: str) -> Image.Image:
    try:
        return upright_rgb(image)
    # Untrusted bytes make Pillow's decoders raise nearly any type; each means that this image cannot be decoded.
    except Exception as error:
        raise _unreadable(name, error) from error


def header_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the image that `decode` would return, without decoding pixels.

    Raises:
        RejectedSample: by its header it is not an image that `decode` accepts, or it has too many pixels.
    """
    image = _open(data, name)
    try:
        _check_form(image)
    except ValueError as error:
        raise _unreadable(name, error) from error
    if image.format == "PNG" and _metadata_after_pixels(data):
        image = decode(data, name)
        return image.height, image.width
    # Pillow reports the size of a TIFF after rotation, that of all other formats as stored.
    if image.format != "TIFF" and _orientation(image) in _SIDEWAYS:
        return image.width, image.height
    return image.height, image.width


def _open(data: bytes, name: str) -> Image.Image:
    """Opens an image that is within the limits."""
    try:
        check_bytes(data)
        image = Image.open(io.BytesIO(_without_text(data)), formats=FORMATS)
        check_opened(image, data)
    except TooCostly as error:
        raise _too_costly(name, error) from error
    except Image.DecompressionBombError as error:
        raise RejectedSample(Reason.DECOMPRESSION_BOMB, f"the image {name}: {error}") from error
    except UnidentifiedImageError as error:
        if data.startswith((b"II*\0", b"MM\0*")):
            sentence = f"the image {name} is a TIFF of a kind that cannot be read; save it as 8-bit RGB"
        else:
            sentence = f"the image {name} is in none of the formats {', '.join(FORMATS)}"
        raise RejectedSample(Reason.UNREADABLE_IMAGE, sentence) from error
    except Exception as error:  # as in decode
        raise _unreadable(name, error) from error
    return image


def _without_text(data: bytes) -> bytes:
    """A PNG without text and colour profile, which nothing here uses and Pillow limits; other bytes are unchanged."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, place, texts = [data[:8]], 8, 0
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        if kind in (b"tEXt", b"zTXt", b"iTXt") and end <= len(data):
            text = _orientation_text(kind, data[place + 8 : end - 4], data[place:end])
            kept.append(text)
            texts += len(text)
            if texts > _MAX_ORIENTATION_TEXT:
                raise TooCostly(f"has over {_MAX_ORIENTATION_TEXT >> 20} MiB of text that may hold its orientation")
        elif kind != b"iCCP":
            kept.append(data[place:end])
        place = end
    return b"".join((*kept, data[place:]))


def _orientation_text(kind: bytes, body: bytes, chunk: bytes) -> bytes:
    """A text chunk, uncompressed, if it may hold the orientation, else ``b""``."""
    keyword, _, rest = body.partition(b"\0")
    if keyword not in _PNG_ORIENTATION:
        return b""
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return chunk
    # zTXt: method, data; iTXt: compressed, method, language, 0, translated keyword, 0, data
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        text = zlib.decompressobj().decompress(packed, _MAX_ORIENTATION_TEXT)
    except zlib.error:
        return chunk  # Pillow says what is wrong
    kind, body = (b"tEXt", keyword + b"\0") if kind == b"zTXt" else (b"iTXt", keyword + bytes(5))
    body = kind + body + text
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def _too_costly(name: str, error: TooCostly) -> RejectedSample:
    return RejectedSample(Reason.DECOMPRESSION_BOMB, f"the image {name} {error}")


def _unreadable(name: str, error: Exception) -> RejectedSample:
    if isinstance(error, MemoryError):
        return RejectedSample(Reason.DECOMPRESSION_BOMB, f"the image {name} takes too much memory to decode")
    sentence = f"the image {name} cannot be decoded ({type(error).__name__}: {error})"
    return RejectedSample(Reason.UNREADABLE_IMAGE, sentence)


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation that is known so far; ``None`` for broken EXIF, as viewers show such images as stored."""
    try:
        return Image.Image.getexif(image).get(_ORIENTATION_TAG)  # a PNG's own getexif would decode it
    except Exception:  # untrusted bytes, as in decode
        return None


def _metadata_after_pixels(png: bytes) -> bool:
    """Whether the orientation may be in a chunk that Pillow finds only after decoding."""
    pixels = png.find(b"IDAT")
    return any(png.find(mark, pixels) >= 0 for mark in (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"))


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as a viewer shows it: upright by its EXIF, transparency over white, 16 bits scaled to 8.

    Raises:
        ValueError: its pixels are not colours. Pillow raises many other types for a broken image.
    """
    _check_form(image)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = _over_white(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of up to 16 bits, converted in strips: all at once would take ten times the memory of its file."""
    tags = getattr(image, "tag_v2", {})
    bits = 12 if tags.get(_BITS_TAG, (16,))[0] == 12 else 16
    white_is_zero = tags.get(_PHOTOMETRIC_TAG) == 0
    transparent = image.info.get("transparency")
    grey = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if strip.min() < 0 or strip.max() >= 1 << bits:
            raise ValueError(f"pixels outside {bits} bits have no brightness")
        scaled = (strip >> (bits - 8)).astype(np.uint8)
        if white_is_zero:  # Pillow inverts up to 8 bits
            scaled = 255 - scaled
        grey[top : top + rows] = scaled if transparent is None else np.where(strip == transparent, 255, scaled)
    return Image.fromarray(grey).convert("RGB")


def _check_form(image: Image.Image) -> None:
    """Raises ValueError for an opened image whose pixels are not colours, or would be decoded wrongly."""
    if image.format == "TIFF":
        _check_tiff(image)
    if image.mode == "F":
        raise ValueError("pixels that are fractions have no colour")


def _check_tiff(image: Image.Image) -> None:
    """Rejects TIFFs that Pillow decodes to wrong colours; they were found by writing all combinations of the tags.

    Raises:
        ValueError: the text says what the file has.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:  # a deep or pickled copy of an opened image has only pixels
        return
    bits, photometric = tags.get(_BITS_TAG, (1,)), tags.get(_PHOTOMETRIC_TAG, 0)
    uncompressed, planar = tags.get(_COMPRESSION_TAG, 1) == 1, tags.get(_PLANAR_TAG, 1) == 2
    if set(tags.get(_SAMPLE_FORMAT_TAG, (1,))) != {1} or max(bits) > 16:
        raise ValueError("samples that are signed, fractions or of over 16 bits have no brightness")
    if planar and image.mode in ("LA", "La", "PA", "LAB"):
        raise ValueError(f"{image.mode} in separate planes cannot be read; save it with interleaved samples")
    plain = set(bits) == {8} and tags.get(_FILL_ORDER_TAG, 1) == 1 and photometric in (1, 2, 3, 5)
    if planar and uncompressed and not plain:
        raise ValueError(f"separate planes of {bits[0]} bits cannot be read; save it with interleaved samples")
    if uncompressed and photometric == 6 and tags.get(_SUBSAMPLING_TAG) != (1, 1):
        raise ValueError("uncompressed YCbCr with subsampled colour cannot be read; save it as RGB")
    if photometric == 5 and tags.get(_INK_SET_TAG, 1) != 1:
        raise ValueError("its inks are not cyan, magenta, yellow and black")
    if photometric == 3 and 0 < max(tags.get(_COLORMAP_TAG, (0,))) < 256:
        raise ValueError("its palette has 8-bit values where TIFF has 16-bit ones; save it as RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    return paper


def recompress(image: Image.Image, quality: int) -> Image.Image:
    """The RGB image after lossy JPEG compression with a quality from 1 to 100: an augmentation."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file, formats=("JPEG",)).convert("RGB")


def image_grid(image: Image.Image, name: str, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(grid_h, grid_w) of a decoded image in patches."""
    return grid_of_size(image.height, image.width, name, min_pixels, max_pixels)


def grid_of_size(height: int, width: int, name: str, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(grid_h, grid_w) in patches of an image of ``height x width`` pixels.

    Raises:
        RejectedSample: one side of the image is more than 200 times as long as the other.
    """
    try:
        height, width = smart_resize(height, width, IMAGE_TOKEN_SIDE, min_pixels, max_pixels)
    except ValueError as error:
        raise RejectedSample(Reason.ASPECT_RATIO, f"the image {name}: {error}") from error
    return height // PATCH, width // PATCH


def image_tokens(grids: np.ndarray) -> np.ndarray:
    """Image tokens of images: int64 [...] for grids in patches [..., 2]; each covers 2 x 2 patches."""
    return grids.prod(axis=-1, dtype=np.int64) // 4


def patches_from_image(image: Image.Image, grid: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Resizes (bicubic) and cuts a decoded image: uint8 [image tokens, 4, 768].

    Args:
        image: RGB.
        grid: (grid_h, grid_w) in patches, both even.
        out: where to write the patches; a new array by default.
    """
    grid_h, grid_w = grid
    if out is None:
        out = np.empty((grid_h * grid_w // 4, 4, PATCH_VALUES), np.uint8)
    resized = resize_to_grid(image, grid)
    # A row of a patch, 16 bytes, is moved as one value: [row, column, dy, dx, channel, y] of the image tokens.
    values = np.reshape(out.view("V16"), (grid_h // 2, grid_w // 2, 2, 2, 3, PATCH), copy=False)
    for top in range(0, grid_h // 2, 2):  # two rows of image tokens at a time stay in the processor's cache
        rows = values[top : top + 2]
        strip = resized.crop((0, top * IMAGE_TOKEN_SIDE, resized.width, (top + len(rows)) * IMAGE_TOKEN_SIDE))
        for channel, band in enumerate("RGB"):
            # Pillow extracts one channel four times as fast as NumPy.
            plane = np.frombuffer(strip.tobytes("raw", band), "V16").reshape(len(rows), 2, PATCH, grid_w // 2, 2)
            rows[..., channel, :] = plane.transpose(0, 3, 1, 4, 2)
    return out


def resize_to_grid(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The image resized (bicubic) to the pixels of its grid."""
    size = (grid[1] * PATCH, grid[0] * PATCH)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def normalise(patches: np.ndarray) -> np.ndarray:
    """Patches uint8 [..., 768] -> float32: scaled to [0, 1], then by ImageNet's mean and deviation of each channel."""
    mean = np.repeat(np.array(IMAGE_MEAN, np.float32), PATCH * PATCH)
    deviation = np.repeat(np.array(IMAGE_STD, np.float32), PATCH * PATCH)
    return (patches.astype(np.float32) / np.float32(255) - mean) / deviation
