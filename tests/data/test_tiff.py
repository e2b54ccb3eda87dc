"""TIFF in all its forms: each is decoded to the pixels that were written, or rejected, but never decoded wrongly."""

import itertools
import struct
import zlib
from collections import Counter

import numpy as np
import pytest

from neo_megatron.data.image import decode, header_size
from neo_megatron.errors import Reason, RejectedSample

HEIGHT, WIDTH = 37, 50
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, LAB: 3}
UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2  # extra samples


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    endian: str = "<",
    planar: int = 1,
    deflate: bool = False,
    tile: int | None = None,
    extra: tuple[int, ...] = (),
    fill_order: int = 1,
    kind: str = "u",
    tags: dict[int, list[int]] | None = None,
) -> bytes:
    """A file of TIFF 6.0; its output was checked with tifffile 2026.11. ``samples`` [height, width, samples]."""

    def chunk(block: np.ndarray) -> bytes:
        rows = block.reshape(len(block), -1)
        if bits % 8 == 0:
            data = rows.astype(f"{endian}{kind}{bits // 8}").tobytes()
        else:
            data = np.packbits(
                (rows[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(len(rows), -1), axis=1
            ).tobytes()
        if fill_order == 2:
            data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little").tobytes()
        return zlib.compress(data) if deflate else data

    height, width, count = samples.shape
    chunks = []
    for plane in np.split(samples, count, axis=-1) if planar == 2 else [samples]:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            places = itertools.product(range(0, height, tile), range(0, width, tile))
            chunks += [chunk(padded[y : y + tile, x : x + tile]) for y, x in places]
        else:
            chunks += [chunk(plane[y : y + 8]) for y in range(0, height, 8)]
    sizes, offsets = [len(data) for data in chunks], []
    body = bytearray(8)
    for data in chunks:
        offsets.append(len(body))
        body += data + bytes(len(data) % 2)
    entries = {256: [width], 257: [height], 258: [bits] * count, 259: [8 if deflate else 1], 262: [photometric]}
    entries |= {266: [fill_order], 277: [count], 284: [planar], 339: [" uif".index(kind)] * count}
    entries |= {322: [tile], 323: [tile], 324: offsets, 325: sizes} if tile else {278: [8], 273: offsets, 279: sizes}
    entries |= ({338: list(extra)} if extra else {}) | (tags or {})
    table = b""
    for tag, values in sorted(entries.items()):
        code, form = (4, "I") if tag in (273, 279, 324, 325) else (3, "H")
        data = struct.pack(f"{endian}{len(values)}{form}", *values)
        if len(data) > 4:
            place = struct.pack(f"{endian}I", len(body))
            body += data + bytes(len(data) % 2)
        else:
            place = data.ljust(4, b"\0")
        table += struct.pack(f"{endian}HHI", tag, code, len(values)) + place
    body[:8] = struct.pack(f"{endian}2sHI", b"II" if endian == "<" else b"MM", 42, len(body))
    return bytes(body) + struct.pack(f"{endian}H", len(entries)) + table + bytes(4)


def image_of(
    bits: int, photometric: int, extra: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, dict[int, list[int]]]:
    """(samples, what a viewer shows [height, width, 3] of 0 to 255, further tags)."""
    top, colours = (1 << bits) - 1, SAMPLES[photometric]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    samples = np.stack([(x * 7 + y * 3 * (c + 1) + 40 * c) % 256 * top // 255 for c in range(colours + len(extra))], -1)
    if extra:
        samples[..., -1] = np.where(x > WIDTH // 2, top, top // 3)
    if extra == (ASSOCIATED,):
        samples[..., :colours] = samples[..., :colours] * samples[..., -1:] // top
    values, tags = samples / top, {}
    colour = values[..., :colours]
    if photometric == CMYK:
        shown = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    elif photometric == PALETTE:
        entries = np.arange(top + 1)
        palette = np.stack([entries, top - entries, entries * 17 % (top + 1)]) * 65535 // top
        tags = {320: palette.reshape(-1).tolist()}
        shown = palette.T[samples[..., 0]] / 65535
    else:
        shown = 1 - colour if photometric == WHITE_IS_ZERO else colour
    shown = np.broadcast_to(shown, (HEIGHT, WIDTH, 3))
    if extra in ((ASSOCIATED,), (UNASSOCIATED,)):
        alpha = values[..., -1:]
        shown = (shown if extra == (ASSOCIATED,) else shown * alpha) + 1 - alpha
    return samples, np.clip(shown * 255, 0, 255), tags


def shown(data: bytes) -> np.ndarray | None:
    """The decoded pixels; ``None`` for a file that is rejected, which must also happen by its header alone."""
    try:
        return np.asarray(decode(data, "x"), float)
    except RejectedSample as rejected:
        assert rejected.reason == Reason.UNREADABLE_IMAGE
        return None


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 32])
def test_every_form_is_decoded_correctly_or_rejected(bits):
    right: Counter = Counter()
    extras = [(), (UNSPECIFIED,), (ASSOCIATED,), (UNASSOCIATED,)]
    for photometric, extra in itertools.product([WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK], extras):
        if photometric == PALETTE and bits > 8:
            continue
        samples, expected, tags = image_of(bits, photometric, extra)
        for form in itertools.product("<>", [1, 2], [False, True], [None, 16]):
            for fill_order in (1, 2):
                data = tiff(samples, bits, photometric, *form, extra, fill_order, tags=tags)
                pixels = shown(data)
                if pixels is not None:
                    # 16 bits are cut to 8, and Pillow rounds colours of CMYK and under transparency.
                    assert np.abs(pixels - expected).max() < (5 if photometric == CMYK else 3.5), (photometric, form)
                    right[photometric, extra] += 1
    # What scanners and image programs write is read: plain, with an alpha channel, in any layout and order of bytes.
    if bits in (1, 4, 8):
        assert min(right[photometric, ()] for photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE)) >= 8
    if bits in (8, 16):
        assert min(right[RGB, ()], right[RGB, (UNASSOCIATED,)], right[CMYK, ()], right[BLACK_IS_ZERO, ()]) >= 8
    if bits == 16:
        assert right[WHITE_IS_ZERO, ()] >= 4
    if bits == 32:
        assert not right


@pytest.mark.parametrize("kind", ["i", "f"])
@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, RGB])
def test_signed_samples_and_fractions_are_rejected(kind, photometric):
    for bits in (8, 16, 32) if kind == "i" else (16, 32, 64):
        samples, _, _ = image_of(7, photometric, ())
        for deflate in (False, True):
            data = tiff(samples, bits, photometric, deflate=deflate, kind=kind)
            assert shown(data) is None
            with pytest.raises(RejectedSample):
                header_size(data, "x")


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
def test_other_colour_spaces_are_decoded_correctly_or_rejected(planar, deflate):
    """Colours by the definitions: CIE L*a*b* of D50 in sRGB, and YCbCr of CCIR 601."""
    for photometric, values, colour in (
        (LAB, (255, 0, 0), (255, 255, 255)),
        (LAB, (138, 81, 70), (254, 0, 0)),
        (YCBCR, (150, 100, 180), (223, 123, 100)),
    ):
        samples = np.broadcast_to(np.array(values), (HEIGHT, WIDTH, 3))
        # Without tag 530 the colour has half the size, for which these files have too much data.
        for tags in ({530: [1, 1]},) if photometric == YCBCR else ({},):
            pixels = shown(tiff(samples, 8, photometric, "<", planar, deflate, tags=tags))
            assert pixels is None or np.abs(pixels - colour).max() < 8
            assert pixels is not None or planar == 2
    for photometric in (4, 9, 10, 32803, 34892):  # transparency mask, ICC and ITU L*a*b*, sensor data
        assert shown(tiff(samples, 8, photometric, "<", planar, deflate)) is None


def test_rejections_by_pixels_and_by_header_have_a_reason():
    gray, rgb, cmyk = (image_of(8, photometric, ())[0] for photometric in (BLACK_IS_ZERO, RGB, CMYK))
    for data, words in (
        (tiff(rgb, 16, RGB, planar=2), "separate planes of 16 bits"),
        (
            tiff(np.concatenate([gray, gray], -1), 8, BLACK_IS_ZERO, planar=2, deflate=True, extra=(2,)),
            "LA in separate",
        ),
        (tiff(gray, 8, PALETTE, tags={320: list(range(256)) * 3}), "its palette has 8-bit values"),
        (tiff(rgb, 8, YCBCR, tags={530: [2, 2]}), "subsampled"),
        (tiff(cmyk, 8, CMYK, tags={332: [2]}), "its inks are not"),
        (tiff(gray, 32, BLACK_IS_ZERO), "over 16 bits"),
        (tiff(gray, 16, WHITE_IS_ZERO, ">"), "TIFF of a kind that cannot be read"),
    ):
        for read in (decode, header_size):
            with pytest.raises(RejectedSample, match=words) as raised:
                read(data, "scan.tif")
            assert "scan.tif" in raised.value.sentence
