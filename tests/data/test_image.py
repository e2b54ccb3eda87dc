"""Images compared with the published numbers, and with what a viewer would show."""

import copy
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from neo_megatron.data.image import (
    decode,
    decode_opened,
    header_size,
    image_grid,
    normalise,
    patches_from_image,
    pixel_limit,
    recompress,
    smart_resize,
)
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.hf.image_processing_neo import row_major


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_smart_resize_equals_the_published_one(golden):
    cases = json.loads((golden / "smart_resize.json").read_text())
    assert len(cases) == 308
    for case in cases:
        try:
            size = list(smart_resize(case["h"], case["w"], case["factor"], case["min_pixels"], case["max_pixels"]))
        except ValueError as error:
            size = f"ValueError: {error}"
        assert size == case["out"], case


@pytest.mark.parametrize("name", "abcde")
def test_images_equal_the_published_ones(golden, name):
    expected = load_file(golden / "preprocess.safetensors")
    image = decode((golden / "images" / f"{name}.png").read_bytes(), name)
    assert (np.asarray(image) == expected[f"{name}.raw_u8"]).all()
    grid = image_grid(image, name, min_pixels=4096, max_pixels=65536)
    assert [list(grid)] == expected[f"{name}.grid_hw"].tolist()
    patches = patches_from_image(image, grid)
    # Image token (y, x), patch (dy, dx) in it -> row (2y + dy, 2x + dx) of the published row-major grid.
    for row, values in enumerate(expected[f"{name}.patches"]):
        y, x = divmod(row, grid[1])
        mine = patches[(y // 2) * (grid[1] // 2) + x // 2, (y % 2) * 2 + x % 2]
        np.testing.assert_allclose(normalise(mine), values, atol=1e-6, rtol=0)


def test_transparency_is_pasted_on_white_as_published(golden):
    """As in SenseNova-U1; the kits of NEO 1.0 and NEO-ov drop alpha if no pixel is fully transparent."""
    expected = load_file(golden / "u1" / "preprocess_rgba.safetensors")
    image = decode((golden / "u1" / "images" / "rgba.png").read_bytes(), "rgba.png")
    assert (np.asarray(image) == expected["rgba.flattened_u8"]).all()
    grid = image_grid(image, "rgba.png", min_pixels=4096, max_pixels=65536)
    assert [list(grid)] == expected["rgba.grid_hw"].tolist()
    rows = row_major(normalise(patches_from_image(image, grid)), *grid)
    np.testing.assert_allclose(rows, expected["rgba.patches"], atol=1e-6, rtol=0)


def test_patches_are_written_into_a_given_array(new_png):
    image = decode(new_png(80, 110), "x")
    expected = patches_from_image(image, (4, 6))
    # The definition: image tokens, patches in each, channel, y, x.
    pixels = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))
    blocks = pixels.reshape(2, 2, 16, 3, 2, 16, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    assert (expected == blocks.reshape(6, 4, 768)).all()
    wanted = np.full((8, 4, 768), 7, np.uint8)
    assert patches_from_image(image, (4, 6), wanted[1:7]).base is wanted
    assert (wanted[1:7] == expected).all() and (wanted[[0, 7]] == 7).all()
    apart = np.zeros((6, 8, 768), np.uint8)
    patches_from_image(image, (4, 6), apart[:, ::2])
    assert (apart[:, ::2] == expected).all() and (apart[:, 1::2] == 0).all()


def test_several_images_share_twice_the_limit():
    assert pixel_limit(65536, 4194304, 1) == 4194304
    assert pixel_limit(65536, 4194304, 3) == 4194304 * 2 // 3
    assert pixel_limit(65536, 4194304, 1000) == 65536


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """Compared with a table of where the stored row 0 and column 0 belong (TIFF 6.0, tag 274)."""
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:8], upright[:, :8] = (255, 0, 0), (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (np.asarray(decode(data, "x")) == upright).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_blended_with_white(kind):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (10, 20, 30, 255)
    pixels[0, 7] = (0, 0, 0, 128)
    shown = np.asarray(decode(encoded(Image.fromarray(pixels), kind, lossless=True), "x"))
    assert (shown[:, :4] == (10, 20, 30)).all()
    assert (shown[1:, 4:] == 255).all()
    assert abs(shown[0, 7].astype(int) - 127).max() <= 1


def test_palette_transparency_is_blended_with_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(1, (0, 0, 4, 8))
    shown = np.asarray(decode(encoded(image, transparency=0), "x"))
    assert (shown[:, :4] == (0, 200, 0)).all() and (shown[:, 4:] == 255).all()


def test_sixteen_bits_are_scaled():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    shown = np.asarray(decode(encoded(Image.fromarray(ramp)), "x"))
    assert (shown[..., 0] == ramp >> 8).all()


def test_twelve_bits_are_scaled(tmp_path):
    """A TIFF of two pixels, 4095 and 256, packed in three bytes."""
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf1\x00\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(decode(data, "x"))[0, :, 0].tolist() == [255, 16]


def test_sixteen_bit_images_may_be_transparent():
    ramp = np.array([[0, 300, 65535]], np.uint16)
    header = struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0)
    data = png_of(
        (b"IHDR", header), (b"tRNS", b"\1\x2c"), (b"IDAT", zlib.compress(b"\0" + ramp.astype(">u2").tobytes()))
    )
    assert np.asarray(decode(data, "x"))[0, :, 0].tolist() == [0, 255, 255]


def test_pixels_without_a_brightness_are_rejected():
    for pixels in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70000, np.int32), np.full((8, 8), -1, np.int32)):
        with pytest.raises(RejectedSample) as raised:
            decode(encoded(Image.fromarray(pixels), "TIFF"), "x")
        assert raised.value.reason == Reason.UNREADABLE_IMAGE


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_is_ignored(exif):
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert decode(data, "x").size == (40, 20)
    assert header_size(data, "x") == (20, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_from_the_header_is_that_of_the_decoded_image(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (96, 64)), kind, exif=exif)
    image = decode(data, "x")
    assert image.size == ((96, 64) if orientation < 5 else (64, 96))
    assert header_size(data, "x") == (image.height, image.width)


def test_orientation_after_the_pixels_is_applied():
    """PNG allows that; Pillow reads it only while decoding."""
    exif = Image.Exif()
    exif[0x0112] = 6
    header = (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress(bytes(20)))
    data = png_of(header, pixels, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    assert decode(data, "x").size == (2, 3)
    assert header_size(data, "x") == (3, 2)


def test_images_are_rejected_by_their_header():
    with pytest.raises(RejectedSample, match="none of the formats"):
        header_size(b"no image", "x")
    with pytest.raises(RejectedSample, match="12000 x 12000"):
        header_size(bomb(12000, 12000), "x")
    image = encoded(Image.new("RGB", (96, 64)), "JPEG")
    assert header_size(image[: len(image) - 20], "x") == (64, 96)  # pixels are not read


def test_multi_image_jpegs_are_kept():
    """Phones write them; the first image is decoded."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.asarray(decode(data, "x"))[0, 0].tolist() == [254, 0, 0]


def test_recompression_loses_more_at_lower_quality(new_png):
    image = decode(new_png(64, 64), "x")
    errors = [
        np.abs(np.asarray(recompress(image, quality)).astype(int) - np.asarray(image)).mean() for quality in (95, 50, 5)
    ]
    assert errors == sorted(errors) and errors[0] > 0
    assert recompress(image, 50).tobytes() == recompress(image, 50).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_are_converted_to_rgb(mode):
    image = Image.new(mode, (8, 8))
    assert decode(encoded(image, "TIFF"), "x").mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_copies_of_an_opened_image_are_decoded(kind, new_png):
    """Data loaders and trainers make them; Pillow's copies have no file, and deep ones not even the attribute."""
    file = io.BytesIO()
    Image.open(io.BytesIO(new_png(40, 30))).save(file, kind)
    expected = np.array(decode(file.getvalue(), "a"))
    for copied in (lambda image: image, copy.copy, copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))):
        opened = Image.open(io.BytesIO(file.getvalue()))
        assert (np.array(decode_opened(copied(opened), "a")) == expected).all()


def test_the_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data, "x"))[0, 0].tolist() == [255, 0, 0]


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with these chunks."""
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels; nothing follows it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_of((b"IHDR", header), (b"IDAT", zlib.compress(b"")))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(12000, 12000), (60000, 60000)])
def test_too_many_pixels_are_rejected_by_the_header(size):
    with pytest.raises(RejectedSample) as raised:
        decode(bomb(*size), "bomb.png")
    assert raised.value.reason == Reason.DECOMPRESSION_BOMB
    assert "bomb.png" in raised.value.sentence


def test_jpeg_2000_has_its_own_pixel_limit():
    """Its decoder takes 18 bytes per pixel."""
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG2000", no_jp2=True))
    start = data.index(b"\xff\x51") + 6
    data[start : start + 8] = struct.pack(">II", 10000, 7000)
    with pytest.raises(RejectedSample, match="10000 x 7000"):
        decode(bytes(data), "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_images_are_rejected(kind, new_png):
    image = encoded(Image.open(io.BytesIO(new_png(64, 64))), kind)
    assert decode(image, "x").size == (64, 64)
    with pytest.raises(RejectedSample) as raised:
        decode(image[: len(image) // 2], "x")
    assert raised.value.reason == Reason.UNREADABLE_IMAGE


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_other_bytes_are_rejected_without_memory_addresses(data):
    """The message is the same in every run, without the address of a buffer. EPS would start a program."""
    reasons = set()
    for _ in range(2):
        with pytest.raises(RejectedSample) as raised:
            decode(data, "x")
        assert raised.value.reason == Reason.UNREADABLE_IMAGE
        reasons.add(raised.value.sentence)
    assert len(reasons) == 1 and "0x" not in reasons.pop()
