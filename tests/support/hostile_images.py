"""Image files that are small and take long or much memory to decode, made by the writers of their formats.

Run as a program it prints the time and the peak memory of `decode` for each: ``python tests/hostile_images.py [NAME]``.
"""

import io
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable

from PIL import Image

_MEGABYTE = 1 << 20


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- JPEG ------------------------------------------------------------------------------------------------------------


def jpeg_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG of ``side x side`` pixels with so many scans of nothing."""
    data = _saved(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=1)
    end = data.rindex(b"\xff\xd9")
    return data[:end] + data[data.rindex(b"\xff\xda") : end] * scans + data[end:]


def jpeg_many_sequential_scans(scans: int, side: int) -> bytes:
    """A baseline JPEG whose components stand in scans of their own, over and over."""
    data = _saved(Image.new("RGB", (side, side)), "JPEG", quality=1, subsampling=0)
    start, end = data.index(b"\xff\xda"), data.rindex(b"\xff\xd9")
    components = [data[start + 5 + 2 * number : start + 7 + 2 * number] for number in range(3)]
    one = [b"\xff\xda" + struct.pack(">HB", 8, 1) + component + b"\x00\x3f\x00" for component in components]
    return data[:start] + b"".join(one) * (scans // 3) + data[end:]


def jpeg_segments(count: int, segment: bytes) -> bytes:
    """A JPEG with so many segments before its image."""
    data = _saved(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + segment * count + data[2:]


def jpeg_exif(count: int) -> bytes:
    body = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + bytes(65000)
    return jpeg_segments(count, b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)


def jpeg_junk(size: int) -> bytes:
    data = _saved(Image.new("RGB", (8, 8)), "JPEG")
    return data[:3] + b"\x00" * size + data[2:]


# --- PNG and GIF -----------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, chunks: bytes = b"", body: bytes | None = None, bits: int = 8, colour: int = 0
) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = bytes((1 + width) * height) if body is None else body
    return b"\x89PNG\r\n\x1a\n" + header + chunks + _chunk(b"IDAT", zlib.compress(pixels, 9)) + _chunk(b"IEND", b"")


def png_texts(count: int, size: int) -> bytes:
    """Texts that may hold an orientation, which come to much when they are decompressed."""
    body = b"Raw profile type exif\0\0" + zlib.compress(b"\n" * size, 9)
    return png(8, 8, _chunk(b"zTXt", body) * count)


def png_chunks(count: int, kind: bytes = b"prVt") -> bytes:
    return png(8, 8, _chunk(kind, b"") * count)


def png_empty_data(count: int) -> bytes:
    good = png(8, 8)
    place = good.index(b"IDAT") - 4
    return good[:place] + _chunk(b"IDAT", b"") * count + good[place:]


def gif_blocks(introducer: bytes, block: bytes, count: int) -> bytes:
    """A GIF with so many blocks in an extension before its image."""
    data = _saved(Image.new("P", (8, 8)), "GIF")
    place = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1 if data[10] & 0x80 else 0))
    return data[:place] + introducer + block * count + b"\0" + data[place:]


def gif_junk(size: int) -> bytes:
    data = _saved(Image.new("P", (8, 8)), "GIF")
    place = data.index(b",", 13)
    return data[:place] + b"\1" * size + data[place:]


# --- TIFF ------------------------------------------------------------------------------------------------------------


def tiff(entries: dict[int, tuple[str, list[int]]], tail: bytes = b"") -> bytes:
    """A little-endian TIFF of these tags; ``tail`` follows the 8 bytes of the header."""
    body = bytearray(b"II*\0\0\0\0\0" + tail)
    table = b""
    for tag, (form, values) in sorted(entries.items()):
        data = struct.pack(f"<{len(values)}{form}", *values)
        if len(data) > 4:
            place = struct.pack("<I", len(body))
            body += data + bytes(len(data) % 2)
        else:
            place = data.ljust(4, b"\0")
        table += struct.pack("<HHI", tag, {"B": 1, "H": 3, "I": 4}[form], len(values)) + place
    body[4:8] = struct.pack("<I", len(body))
    return bytes(body) + struct.pack("<H", len(entries)) + table + bytes(4)


def tiff_tiles(
    width: int, height: int, tile: tuple[int, int], data: bytes, compression: int, samples: int = 1
) -> bytes:
    """A TIFF whose tiles are all the same bytes."""
    count = -(-width // tile[0]) * -(-height // tile[1])
    entries = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8] * samples),
        259: ("H", [compression]),
        262: ("H", [2 if samples == 3 else 1]),
        277: ("H", [samples]),
        322: ("I", [tile[0]]),
        323: ("I", [tile[1]]),
        324: ("I", [8] * count),
        325: ("I", [len(data)] * count),
    }
    return tiff(entries, data)


def tiff_strips(width: int, height: int, data: bytes, compression: int) -> bytes:
    """A TIFF with a strip for each row, all the same bytes."""
    entries = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8]),
        259: ("H", [compression]),
        262: ("H", [1]),
        273: ("I", [8] * height),
        277: ("H", [1]),
        278: ("I", [1]),
        279: ("I", [len(data)] * height),
    }
    return tiff(entries, data)


def tiff_offsets(count: int) -> bytes:
    entries = {256: ("I", [8]), 257: ("I", [8]), 258: ("H", [8]), 259: ("H", [1]), 262: ("H", [1]), 277: ("H", [1])}
    entries |= {278: ("I", [8]), 273: ("I", [8] * count), 279: ("I", [64] * count)}
    return tiff(entries, bytes(64))


def tiff_overlapping_tags(count: int, size: int) -> bytes:
    """Tags that all have the same megabytes as their value."""
    good = tiff({256: ("I", [8]), 257: ("I", [8]), 258: ("H", [8]), 262: ("H", [1]), 273: ("I", [8])}, bytes(size))
    place = int.from_bytes(good[4:8], "little")
    tags = b"".join(struct.pack("<HHII", 1000 + number, 7, size, 8) for number in range(count))
    known = struct.unpack_from("<H", good, place)[0]
    end = place + 2 + 12 * known
    return good[:place] + struct.pack("<H", known + count) + good[place + 2 : end] + tags + bytes(4)


# --- decoders that are written in Python -----------------------------------------------------------------------------


def bmp_rle(width: int, height: int, body: bytes) -> bytes:
    palette = bytes(1024)
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + palette + body


def ppm(width: int, height: int, most: int, form: str = "P6") -> bytes:
    head = f"{form}\n{width} {height}\n{most}\n".encode()
    if form == "P3":
        return head + b"1 " * (3 * width * height)
    return head + bytes(width * height * (3 if form == "P6" else 1) * (2 if most > 255 else 1))


# --- WebP, AVIF and JPEG 2000 ----------------------------------------------------------------------------------------


def webp(width: int, height: int) -> bytes:
    """34 bytes: one colour, without loss."""
    bits = f"{0x2F:08b}"[::-1] + f"{width - 1:014b}"[::-1] + f"{height - 1:014b}"[::-1] + "0" + "000"
    bits += "0" + "0" + "0" + ("1" + "0" + "0" + "0") * 5  # no transform, cache or meta codes; five codes of one symbol
    bits += "0" * (-len(bits) % 8)
    body = bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, len(bits), 8)) + bytes(4)
    chunk = b"VP8L" + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg2000(width: int, height: int, layers: int = 1, precinct: int = 0, tile: int | None = None) -> bytes:
    """A code stream with the header of a large image and the data of a small one.

    Args:
        precinct: binary logarithm of the size of a precinct in each resolution, 0 for a pixel; 15 is the largest.
    """
    tile = tile or max(width, height)
    size = struct.pack(">HIIIIIIIIHBBB", 0, width, height, 0, 0, tile, tile, 0, 0, 1, 7, 1, 1)
    levels = 5
    style = bytes([1, 0]) + struct.pack(">HB", layers, 0) + bytes([levels, 4, 4, 0, 1])
    style += bytes([precinct * 17] * (levels + 1))
    quantities = bytes([0x40] + [8 << 3] * (3 * levels + 1))

    def segment(mark: int, body: bytes) -> bytes:
        return struct.pack(">HH", mark, len(body) + 2) + body

    head = b"\xff\x4f" + segment(0xFF51, size) + segment(0xFF52, style) + segment(0xFF5C, quantities)
    tiles = -(-width // tile) * -(-height // tile)
    parts = b"".join(
        struct.pack(">HHHIBB", 0xFF90, 10, number, 14 + 16, 0, 1) + b"\xff\x93" + bytes(16)
        for number in range(min(tiles, 65535))
    )
    return head + parts + b"\xff\xd9"


def avif(width: int, height: int) -> bytes:
    return _saved(Image.new("RGB", (width, height)), "AVIF", speed=10, quality=1)


# Each takes seconds or gigabytes where nothing limits it; the sentence of its limit, "" where it is to be shown.
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "WebP of 34 bytes, 134 megapixels": (lambda: webp(16383, 8192), "pixels"),
    "WebP of 34 bytes, 67 megapixels": (lambda: webp(8192, 8192), "pixels"),
    "progressive JPEG, 15 kB, 1,600 scans of 0.7 megapixels": (lambda: jpeg_scans(1600, 836), "scans"),
    "progressive JPEG, 300 scans of 4 megapixels": (lambda: jpeg_scans(300, 2048), "scans"),
    "progressive JPEG, 100,000 scans of 64 pixels": (lambda: jpeg_scans(100_000, 8), ""),
    "progressive JPEG, 12 scans of 64 megapixels": (lambda: jpeg_scans(6, 8000), ""),
    "sequential JPEG, 1,500 scans of 1 megapixel": (lambda: jpeg_many_sequential_scans(1500, 1024), "scans"),
    "JPEG, 2 million empty segments": (lambda: jpeg_segments(2_000_000, b"\xff\xe5\0\2"), "segments"),
    "JPEG, 2,000 EXIF segments": (lambda: jpeg_exif(2000), "EXIF"),
    "JPEG, 64 MB of junk": (lambda: jpeg_junk(64 * _MEGABYTE), "between its segments"),
    "PNG, 100 texts of 60 MB": (lambda: png_texts(100, 60 * _MEGABYTE), "text"),
    "PNG, 2 million chunks": (lambda: png_chunks(2_000_000), "chunks"),
    "PNG, 2 million empty IDAT": (lambda: png_empty_data(2_000_000), "chunks"),
    "GIF, a comment of 16 MB": (lambda: gif_blocks(b"!\xfe", b"\xff" + b"c" * 255, 65536), "blocks"),
    "GIF, 32 million blocks of a byte": (lambda: gif_blocks(b"!\x01", b"\1c", 32_000_000), "blocks"),
    "GIF, 32 MB of junk": (lambda: gif_junk(32 * _MEGABYTE), "blocks"),
    "TIFF, tiles far larger than the image": (
        lambda: tiff_tiles(16, 64_000, (16384, 16), zlib.compress(bytes(16384 * 16), 9), 8),
        "tiles",
    ),
    "TIFF, a million tiles of 16 x 16": (
        lambda: tiff_tiles(11584, 11584, (16, 16), zlib.compress(bytes(256), 9), 8),
        "tiles",
    ),
    "TIFF, tiles that each read a megabyte": (
        lambda: tiff_tiles(4096, 4096, (16, 16), zlib.compress(bytes(256), 9) + bytes(_MEGABYTE), 8),
        "tiles",
    ),
    "TIFF, tiles of JPEG with 500 scans": (
        lambda: tiff_tiles(8192, 8192, (512, 512), jpeg_scans(500, 512), 7),
        "scans",
    ),
    "TIFF, a strip a row": (lambda: tiff_strips(100, 1_000_000, zlib.compress(bytes(100), 9), 8), "strips"),
    "TIFF, 4 million offsets": (lambda: tiff_offsets(4_000_000), "strips"),
    "TIFF, 30,000 tags of the same 4 MB": (lambda: tiff_overlapping_tags(30_000, 4 * _MEGABYTE), "tags"),
    "BMP, runs of a pixel": (lambda: bmp_rle(16000, 8000, b"\1\0" * 8_000_000), "Python"),
    "BMP, ends of lines": (lambda: bmp_rle(16000, 8000, b"\0\0" * 8000), "Python"),
    "PPM with a maximum of 254": (lambda: ppm(3000, 2000, 254), "Python"),
    "PPM in digits": (lambda: ppm(3000, 3000, 255, "P3"), "Python"),
    "JPEG 2000, precincts of a pixel": (lambda: jpeg2000(4096, 4096), "precincts"),
    "JPEG 2000, 65,535 layers": (lambda: jpeg2000(4096, 4096, layers=65535, precinct=7), "layers"),
    "JPEG 2000, 65,000 tiles": (lambda: jpeg2000(4080, 4080, layers=100, precinct=15, tile=16), "layers"),
    "JPEG 2000, 67 megapixels of nothing": (lambda: jpeg2000(8192, 8192, precinct=15), "pixels"),
    "AVIF, 25 megapixels": (lambda: avif(5000, 5000), "pixels"),
}


def measured(data: bytes, seconds: int = 60) -> tuple[str, float, int]:
    """(outcome, seconds of CPU, bytes of peak memory above those before) of decoding in a process of its own."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        import signal

        from neo_megatron.data.image import decode
        from neo_megatron.errors import RejectedSample

        signal.alarm(seconds)
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            image = decode(data, "x")
            outcome = f"{image.width} x {image.height}"
        except RejectedSample as rejected:
            outcome = rejected.sentence
        except MemoryError:
            outcome = "MemoryError"
        used = time.process_time() - begun
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(sender, repr((outcome, used, peak)).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    import ast

    return ast.literal_eval(text.decode()) if text else (f"ended after {seconds} seconds", float(seconds), 0)


if __name__ == "__main__":
    import neo_megatron.data.image  # noqa: F401 - before the processes

    for name, (make, _) in HOSTILE.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        content = make()
        outcome, used, peak = measured(content)
        print(f"{name:60} {len(content) / 1e6:8.3f} MB {used:7.2f} s {peak / 1e6:8.0f} MB  {outcome[:120]}", flush=True)
