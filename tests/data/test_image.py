"""Pictures against the published numbers, and what a viewer would show."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from neo_megatron.data import image as picture
from neo_megatron.data.errors import Reason, RejectedSample


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_smart_resize_equals_the_published_one(golden):
    cases = json.loads((golden / "smart_resize.json").read_text())
    assert len(cases) == 308
    for case in cases:
        try:
            size = list(
                picture.smart_resize(case["h"], case["w"], case["factor"], case["min_pixels"], case["max_pixels"])
            )
        except ValueError as error:
            size = f"ValueError: {error}"
        assert size == case["out"], case


@pytest.mark.parametrize("name", "abcde")
def test_pictures_equal_the_published_ones(golden, name):
    expected = load_file(golden / "preprocess.safetensors")
    image = picture.decode((golden / "images" / f"{name}.png").read_bytes(), name)
    assert (np.asarray(image) == expected[f"{name}.raw_u8"]).all()
    grid = picture.picture_grid(image, name, min_pixels=4096, max_pixels=65536)
    assert [list(grid)] == expected[f"{name}.grid_hw"].tolist()
    patches = picture.patches_from_image(image, grid)
    # Cell (y, x), patch (dy, dx) in it -> row (2y + dy, 2x + dx) of the published row-major grid.
    for row, values in enumerate(expected[f"{name}.patches"]):
        y, x = divmod(row, grid[1])
        mine = patches[(y // 2) * (grid[1] // 2) + x // 2, (y % 2) * 2 + x % 2]
        np.testing.assert_allclose(picture.normalise(mine), values, atol=1e-6, rtol=0)


def test_several_pictures_share_twice_the_limit():
    assert picture.pixel_limit(65536, 4194304, 1) == 4194304
    assert picture.pixel_limit(65536, 4194304, 3) == 4194304 * 2 // 3
    assert picture.pixel_limit(65536, 4194304, 1000) == 65536


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """Against a table of where the stored row 0 and column 0 belong (TIFF 6.0, tag 274)."""
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
    assert (np.asarray(picture.decode(data, "x")) == upright).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_over_white(kind):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (10, 20, 30, 255)
    pixels[0, 7] = (0, 0, 0, 128)
    shown = np.asarray(picture.decode(encoded(Image.fromarray(pixels), kind, lossless=True), "x"))
    assert (shown[:, :4] == (10, 20, 30)).all()
    assert (shown[1:, 4:] == 255).all()
    assert abs(shown[0, 7].astype(int) - 127).max() <= 1


def test_palette_transparency_lies_over_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(1, (0, 0, 4, 8))
    shown = np.asarray(picture.decode(encoded(image, transparency=0), "x"))
    assert (shown[:, :4] == (0, 200, 0)).all() and (shown[:, 4:] == 255).all()


def test_sixteen_bits_are_scaled():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    shown = np.asarray(picture.decode(encoded(Image.fromarray(ramp)), "x"))
    assert (shown[..., 0] == ramp >> 8).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.new(mode, (8, 8))
    assert picture.decode(encoded(image, "TIFF"), "x").mode == "RGB"


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(picture.decode(data, "x"))[0, 0].tolist() == [255, 0, 0]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels; nothing follows it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    body = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(12000, 12000), (60000, 60000)])
def test_too_many_pixels_are_refused_by_the_header(size):
    with pytest.raises(RejectedSample) as raised:
        picture.decode(bomb(*size), "bomb.png")
    assert raised.value.reason == Reason.DECOMPRESSION_BOMB
    assert "bomb.png" in raised.value.sentence


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_pictures_are_refused(kind, new_png):
    whole = encoded(Image.open(io.BytesIO(new_png(64, 64))), kind)
    assert picture.decode(whole, "x").size == (64, 64)
    with pytest.raises(RejectedSample) as raised:
        picture.decode(whole[: len(whole) // 2], "x")
    assert raised.value.reason == Reason.UNREADABLE_PICTURE


@pytest.mark.parametrize("data", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_refused_without_addresses(data):
    """The reason is the same in every run: no address of a buffer in it. EPS would start a program."""
    reasons = set()
    for _ in range(2):
        with pytest.raises(RejectedSample) as raised:
            picture.decode(data, "x")
        assert raised.value.reason == Reason.UNREADABLE_PICTURE
        reasons.add(raised.value.sentence)
    assert len(reasons) == 1 and "0x" not in reasons.pop()
