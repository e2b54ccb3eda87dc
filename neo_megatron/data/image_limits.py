"""Limits of the work that an image file may cause its decoder, checked in its structure before anything is decoded.

An image that is rejected here would take many seconds or gigabytes, whatever it shows; the limits are far above what
cameras and programs write. An export has a copy of this file (``hf/image_limits_neo.py``).
"""

import math
import re
import struct
from collections.abc import Iterator
from typing import Any

from PIL import Image

MAX_FILE_BYTES = 256 << 20
# 134 megapixels: any phone's camera passes, and decoding takes at most about 1.3 gigabytes.
MAX_DECODED_PIXELS = 1 << 27
# For formats whose decoders take twice as much memory.
_MAX_PIXELS = {"JPEG2000": 1 << 26, "WEBP": 1 << 26}
# A few bytes in these formats may stand for any number of pixels, so large images need a minimum of bytes.
_DENSE_FORMATS, _ALWAYS_PIXELS, _PIXELS_OF_A_BYTE = ("AVIF", "JPEG2000", "WEBP"), 1 << 24, 4096
# Where Pillow has no compiled decoder, a pixel takes microseconds.
_MAX_PYTHON_PIXELS, _MAX_PYTHON_BYTES = 1 << 21, 1 << 24
# Each scan of a JPEG takes the time of a complete image, however few bytes it has: cameras and programs write up to 14.
_USUAL_SCANS, _MAX_SCANNED_PIXELS = 16, 1 << 30
# Pillow reads these one by one in Python, and joins metadata by copying all that came before.
_MAX_SEGMENTS, _MAX_CHUNKS, _MAX_BLOCKS = 1 << 14, 1 << 17, 1 << 16
_MAX_METADATA, _MAX_JUNK = 4 << 20, 1 << 16
_MAX_TIFF_ENTRIES, _MAX_PIECES, _MAX_TILE_PIXELS = 4096, 1 << 18, 1 << 28
_MAX_PRECINCTS, _MAX_PACKETS, _LONGEST_STYLE = 1 << 20, 1 << 22, 64

# The data of a scan hold FF 00 and restart markers; any other marker ends them.
_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
_JPEG_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # baseline, extended, progressive; the last two with arithmetic coding
_JPEG_PADDING = bytes(64)  # a decoder looks a few bytes ahead of the last pixel

_COMPRESSION_TAG, _PLANAR_TAG, _SAMPLES_TAG, _ROWS_TAG = 0x0103, 0x011C, 0x0115, 0x0116
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 0x0142, 0x0143
_PIECE_TAGS = ((0x0144, 0x0145), (0x0111, 0x0117))  # places and sizes of tiles, of strips
_JPEG_COMPRESSIONS = (6, 7)
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


class TooCostly(ValueError):
    """Decoding an image would take too long or too much memory; the text continues "the image a.png "."""


def check_bytes(data: bytes) -> None:
    """Checks what Pillow reads to open a file. Raises TooCostly."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        _check_gif(data)
    elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        _check_tiff_tags(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_pixels("WEBP", *_size_of_webp(data), len(data))  # opening one takes the memory of two canvases
    elif data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        _check_jpeg2000(data)


def check_opened(image: Image.Image, data: bytes) -> None:
    """Checks what decoding an image will take that Pillow has opened from the bytes. Raises TooCostly."""
    kind, pixels = image.format or "", image.width * image.height
    _check_pixels(kind, image.width, image.height, len(data))
    decoders = {tile[0] for tile in getattr(image, "tile", ())}
    if decoders & Image.DECODERS.keys() and (pixels > _MAX_PYTHON_PIXELS or len(data) > _MAX_PYTHON_BYTES):
        raise TooCostly(
            f"is a {kind} of a kind that is decoded in Python, with {pixels} pixels in {len(data)} bytes, more than "
            f"{_MAX_PYTHON_PIXELS} or {_MAX_PYTHON_BYTES}; save it as PNG"
        )
    if kind == "TIFF":
        _check_tiff_pieces(image, data)


def _check_pixels(kind: str, width: int, height: int, size: int) -> None:
    pixels = width * height
    if pixels > (most := _MAX_PIXELS.get(kind, MAX_DECODED_PIXELS)):
        raise TooCostly(f"has {width} x {height} pixels, more than {most}")
    if kind in _DENSE_FORMATS and pixels > max(_ALWAYS_PIXELS, _PIXELS_OF_A_BYTE * size):
        raise TooCostly(
            f"has {width} x {height} pixels in {size} bytes, more than {_PIXELS_OF_A_BYTE} for each and more than "
            f"{_ALWAYS_PIXELS}"
        )


def _size_of_webp(webp: bytes) -> tuple[int, int]:
    """(width, height) from the first chunk; (0, 0) if it does not belong to an image."""
    kind, body = webp[12:16], webp[20:32].ljust(12, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        sides = int.from_bytes(body[1:5], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return 0, 0


# --- JPEG ------------------------------------------------------------------------------------------------------------


def _check_jpeg(jpeg: bytes) -> None:
    metadata = skipped = pixels = components = frame = 0
    place, segments = 2, 0
    while marker := _JPEG_MARKER.search(jpeg, place):
        kind = marker[1][0]
        skipped += marker.start(1) - 1 - place
        segments += 1
        if segments > _MAX_SEGMENTS:
            raise TooCostly(f"has over {_MAX_SEGMENTS} segments before its pixels")
        if skipped > _MAX_JUNK:
            break
        place = marker.end()
        if 0xD0 <= kind <= 0xD9 or kind == 0x01:  # markers alone
            continue
        length = int.from_bytes(jpeg[place : place + 2], "big")
        if kind in _JPEG_FRAMES:
            frame, components = kind, jpeg[place + 7] if place + 7 < len(jpeg) else 0
            pixels = int.from_bytes(jpeg[place + 3 : place + 5], "big") * int.from_bytes(
                jpeg[place + 5 : place + 7], "big"
            )
        elif kind == 0xDA:
            in_scan = jpeg[place + 2] if place + 2 < len(jpeg) else 0
            if frame not in (0xC0, 0xC1, 0xC9) or in_scan < components:
                _check_scans(jpeg, place - 2, pixels)
            return
        elif 0xE0 <= kind <= 0xEF:
            metadata += length if jpeg[place + 2 : place + 7] == b"Exif\0" else 0
            if metadata > _MAX_METADATA:
                raise TooCostly(f"has over {_MAX_METADATA >> 20} MiB of EXIF")
        place += length
    if max(skipped, len(jpeg) - place) > _MAX_JUNK:
        raise TooCostly(f"has over {_MAX_JUNK} bytes between its segments, before its pixels")


def _check_scans(jpeg: bytes, place: int, pixels: int) -> None:
    if jpeg.count(b"\xff\xda", place) <= _USUAL_SCANS:  # a few may stand within tables
        return
    scans = sum(kind == 0xDA for kind, _, _ in jpeg_segments(jpeg, place))
    if scans > _USUAL_SCANS and scans * pixels > _MAX_SCANNED_PIXELS:
        raise TooCostly(f"cannot be decoded: more than {_USUAL_SCANS} scans of {pixels} pixels take too long")


def jpeg_segments(jpeg: bytes, place: int = 2) -> Iterator[tuple[int, bytes, int]]:
    """Segments of a JPEG up to its end marker: marker, body, and the offset where the body or the scan data end."""
    while marker := _JPEG_MARKER.match(jpeg, place):
        kind, place = marker[1][0], marker.end()
        if 0xD0 <= kind <= 0xD8 or kind == 0x01:  # markers alone
            continue
        if kind == 0xD9:
            yield kind, b"", place
            return
        length = int.from_bytes(jpeg[place : place + 2], "big")
        body, place = jpeg[place + 2 : place + length], place + length
        if kind == 0xDA:
            end = _JPEG_SCAN_END.search(jpeg, place)
            if not end or len(body) < 4 or len(body) != 4 + 2 * body[0]:
                return  # the decoder says what is wrong
            place = end.start()
        yield kind, body, place


def without_end(jpeg: bytes) -> bytes:
    """A JPEG without its end marker: it decodes to the same pixels if it is complete, and fails if it was cut off.

    libjpeg fills missing pixels with grey when it meets the end marker, and Pillow hides its warning. If one scan
    has all components, zeros replace the marker, so a decoder that needs more data runs out of it. In files of several
    scans, such as progressive ones, missing last scans are detected; a cut within the last scan is not.

    Raises:
        ValueError: scans are missing.
    """
    if not jpeg.startswith(b"\xff\xd8"):
        return jpeg
    frame, components, scans = 0, b"", []
    for kind, body, place in jpeg_segments(jpeg):
        if kind in _JPEG_FRAMES:
            frame, components = kind, body[6::3]
        elif kind == 0xDA:
            scans.append(body)
            ends = jpeg[place + 1] == 0xD9
            if frame in (0xC0, 0xC1) and body[:1] == bytes([len(components)]) and ends:
                return jpeg[:place] + _JPEG_PADDING
        elif kind == 0xD9 and components and scans and not _is_covered(components, scans):
            raise ValueError("it is cut off: scans are missing")
    return jpeg


def _is_covered(components: bytes, scans: list[bytes]) -> bool:
    """Whether the headers of all scans give every coefficient of every component, to its last bit."""
    missing = {(component, coefficient) for component in components for coefficient in range(64)}
    for scan in scans:
        first, last, bits = scan[-3:]
        if bits & 15 == 0:  # the lowest bit that the scan gives
            missing -= {(component, k) for component in scan[1:-3:2] for k in range(first, last + 1)}
    return not missing


# --- PNG, GIF --------------------------------------------------------------------------------------------------------


def _check_png(png: bytes) -> None:
    place, chunks = 8, 0
    while place + 12 <= len(png):
        place += 12 + int.from_bytes(png[place : place + 4], "big")
        chunks += 1
        if chunks > _MAX_CHUNKS:
            raise TooCostly(f"has over {_MAX_CHUNKS} chunks")


def _check_gif(gif: bytes) -> None:
    """Follows the extensions before the first image."""
    place = 13 + (3 << (gif[10] & 7) + 1 if len(gif) > 10 and gif[10] & 0x80 else 0)
    metadata = blocks = 0
    while place < len(gif) and gif[place] != 0x2C and gif[place] != 0x3B:
        blocks += 1
        if gif[place] == 0x21:
            place += 2
            while place < len(gif) and (size := gif[place]) and blocks <= _MAX_BLOCKS:
                place += 1 + size
                metadata += size
                blocks += 1
        if blocks > _MAX_BLOCKS or metadata > _MAX_METADATA:
            raise TooCostly(f"has over {_MAX_BLOCKS} blocks, or {_MAX_METADATA >> 20} MiB of them, before its pixels")
        place += 1


# --- TIFF ------------------------------------------------------------------------------------------------------------


def _check_tiff_tags(tiff: bytes) -> None:
    order, big = "<" if tiff[0] == 0x49 else ">", 43 in tiff[2:4]
    entry, number = (struct.Struct(order + "HHQQ"), "Q") if big else (struct.Struct(order + "HHII"), "H")
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), tiff, 8 if big else 4)
        (count,) = struct.unpack_from(order + number, tiff, start)
    except struct.error:
        return  # Pillow says what is wrong
    if count > _MAX_TIFF_ENTRIES:
        raise TooCostly(f"has {count} tags, more than {_MAX_TIFF_ENTRIES}")
    first, total = start + struct.calcsize(number), 0
    for place in range(first, min(first + count * entry.size, len(tiff) - entry.size + 1), entry.size):
        tag, kind, values, _ = entry.unpack_from(tiff, place)
        total += min(values * _TIFF_SIZES.get(kind, 1), len(tiff))
        if values > _MAX_PIECES and any(tag in tags for tags in _PIECE_TAGS):
            raise TooCostly(f"has {values} strips or tiles, more than {_MAX_PIECES}")
    if total > len(tiff) + _MAX_METADATA:
        raise TooCostly(f"has tags of {total} bytes in a file of {len(tiff)}: they overlap")


def _check_tiff_pieces(image: Image.Image, data: bytes) -> None:
    """Checks strips and tiles: each is decoded to its end, even outside the image, and all may be the same bytes."""
    tags = image.tag_v2
    for places_tag, sizes_tag in _PIECE_TAGS:
        places, sizes = tags.get(places_tag, ()), tags.get(sizes_tag, ())
        if not places:
            continue
        if places_tag == _PIECE_TAGS[0][0]:
            area = _number(tags.get(_TILE_WIDTH_TAG)) * _number(tags.get(_TILE_LENGTH_TAG))
        else:
            area = image.width * min(_number(tags.get(_ROWS_TAG, image.height)), image.height)
        if len(places) * area > _MAX_TILE_PIXELS * max(1, _planes(tags)):
            raise TooCostly(f"has {len(places)} tiles or strips of {area} pixels, more than {_MAX_TILE_PIXELS} in all")
        if isinstance(sizes, tuple) and sum(map(_number, sizes)) > 16 * len(data) + _MAX_METADATA:
            raise TooCostly(f"has tiles or strips of 16 times its {len(data)} bytes: they overlap")
        if tags.get(_COMPRESSION_TAG) in _JPEG_COMPRESSIONS:
            counts: dict[tuple[int, int], int] = {}
            scans = 0
            for piece in zip(map(_number, places), map(_number, sizes), strict=False):
                if piece not in counts:
                    counts[piece] = data.count(b"\xff\xda", piece[0], sum(piece))
                scans += counts[piece]
            if scans > _USUAL_SCANS * len(places) and scans * area > _MAX_SCANNED_PIXELS:
                raise TooCostly(f"cannot be decoded: {scans} JPEG scans of {area} pixels take too long")


def _planes(tags: Any) -> int:
    """Pieces that cover the same pixels: one for each sample of a pixel."""
    return _number(tags.get(_SAMPLES_TAG, 1)) if tags.get(_PLANAR_TAG) == 2 else 1


def _number(value: object) -> int:
    """A tag that should be a number; anything else counts as 0, because decoders do not accept it."""
    return value if isinstance(value, int) and value > 0 else 0


# --- JPEG 2000 -------------------------------------------------------------------------------------------------------


def _check_jpeg2000(data: bytes) -> None:
    """Checks precincts and layers: each precinct takes memory, and a packet of each of its layers is searched for."""
    segments = list(_code_stream_segments(data))
    size = next((body for marker, body in segments if marker == 0xFF51), b"")
    if len(size) < 36:
        return  # Pillow says what is wrong
    right, bottom, left, top, width, height = struct.unpack_from(">6I", size, 2)
    components = int.from_bytes(size[34:36], "big")
    across, down = max(right - left, 1), max(bottom - top, 1)
    _check_pixels("JPEG2000", across, down, len(data))
    tiles = math.ceil(across / max(width, 1)) * math.ceil(down / max(height, 1))
    # (layers, levels, sizes of precincts) of the image, and of tiles and components that differ.
    styles = [(int.from_bytes(body[2:4], "big"), body[5], body[10:]) for marker, body in segments if marker == 0xFF52]
    start = 1 if components < 257 else 2
    styles += [(1, body[start + 1], body[start + 6 :]) for marker, body in segments if marker == 0xFF53]
    layers = max((style[0] for style in styles), default=1)
    precincts = 0
    for _, levels, sizes in styles:
        count = 0
        for resolution in range(min(levels, 32) + 1):
            exponents = sizes[resolution] if resolution < len(sizes) else 0xFF
            scale = levels - resolution
            count += math.ceil(min(width, across) / (1 << scale + (exponents & 15))) * math.ceil(
                min(height, down) / (1 << scale + (exponents >> 4))
            )
        precincts = max(precincts, count * tiles * components)
    if precincts > _MAX_PRECINCTS or precincts * layers > _MAX_PACKETS:
        raise TooCostly(
            f"is a JPEG 2000 of {precincts} precincts in {layers} layers, more than {_MAX_PRECINCTS}, or "
            f"{_MAX_PACKETS} in all layers"
        )


def _code_stream_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, body without its length) of the segments in the headers of the code stream and of its tile parts."""
    place, start, part = _code_stream(data) + 2, 0, 0
    for _ in range(_MAX_CHUNKS):
        if place + 4 > len(data):
            return
        marker, length = struct.unpack_from(">HH", data, place)
        if marker == 0xFF93:  # the data of a tile part, as long as its first segment says; 0: to the end
            if not part:
                return
            place = start + part
            continue
        if not 0xFF51 <= marker <= 0xFF90 or length < 2:
            return
        if marker == 0xFF90:
            start, part = place, int.from_bytes(data[place + 6 : place + 10], "big")
        yield marker, data[place + 4 : place + 2 + min(length, _LONGEST_STYLE)].ljust(12, b"\0")
        place += 2 + length


def _code_stream(jpeg2000: bytes) -> int:
    """Offset of the code stream in a file, which may have boxes around it."""
    place = 0
    for _ in range(_MAX_CHUNKS):
        if jpeg2000[place : place + 2] == b"\xff\x4f":
            break
        size, kind = int.from_bytes(jpeg2000[place : place + 4], "big"), jpeg2000[place + 4 : place + 8]
        head = 16 if size == 1 else 8
        if kind == b"jp2c":
            return place + head
        size = int.from_bytes(jpeg2000[place + 8 : place + 16], "big") if size == 1 else size
        if size < head or place + size >= len(jpeg2000):
            return len(jpeg2000)
        place += size
    return place
