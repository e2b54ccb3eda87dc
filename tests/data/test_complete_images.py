"""Files that Pillow reads too strictly or not strictly enough: PNGs with long text, truncated JPEGs."""

import dataclasses
import io
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.image import decode, header_size
from neo_megatron.data.verify import verify
from neo_megatron.errors import Reason, RejectedSample

CASES = Path(__file__).parent / "cases"


def photo(height: int = 240, width: int = 320) -> Image.Image:
    """An image like a photograph, with smooth areas, edges and noise."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.float64)
    pixels[60:120, 80:200] = (200, 30, 60)
    pixels += np.random.default_rng(0).normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or photo()).save(file, "JPEG", **options)
    return file.getvalue()


def closed(data: bytes, share: float) -> bytes:
    """A JPEG cut off after a share of its scans, and closed with an end marker."""
    start = data.index(b"\xff\xda")
    cut = data[: start + int((len(data) - start) * share)]
    return cut.removesuffix(b"\xff") + b"\xff\xd9"


JPEGS = {
    "plain": {},
    "full colour": {"subsampling": 0},
    "optimised": {"optimize": True},
    "low quality": {"quality": 5},
    "best quality": {"quality": 100},
    "restart markers": {"restart_marker_blocks": 7},
    "restart rows": {"restart_marker_rows": 1},
    "grey": {"image": photo().convert("L")},
    "CMYK": {"image": photo().convert("CMYK")},
    "one colour": {"image": Image.new("RGB", (320, 240), (90, 140, 10))},
    "odd size": {"image": photo(241, 323)},
    "tiny": {"image": photo(1, 1)},
    "progressive": {"progressive": True},
    "progressive grey": {"image": photo().convert("L"), "progressive": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_complete_jpegs_are_decoded_to_the_same_pixels(options):
    data = jpeg(**options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    # What cameras and phones append: nothing, zeros, another JPEG, text, a second end marker.
    for tail in (b"", bytes(1000), jpeg(), b"Samsung", b"\xff\xd9"):
        assert (np.asarray(decode(data + tail, "x")) == expected).all()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
@pytest.mark.parametrize("options", [JPEGS[name] for name in list(JPEGS)[:9]], ids=list(JPEGS)[:9])
def test_truncated_jpegs_with_an_end_marker_are_rejected(options, share):
    data = closed(jpeg(**options), share)
    Image.open(io.BytesIO(data)).load()  # Pillow alone fills the rest with grey
    with pytest.raises(RejectedSample) as raised:
        decode(data, "half.jpg")
    assert raised.value.reason == Reason.UNREADABLE_IMAGE and "half.jpg" in raised.value.sentence
    assert header_size(data, "half.jpg")  # --check header does not look at pixels


@pytest.mark.parametrize("name", ["progressive", "progressive grey"])
def test_progressive_jpegs_without_their_last_scans_are_rejected(name):
    """If they are cut before the last scan; a cut within it only loses the last bit of some coefficients."""
    data = jpeg(**JPEGS[name])
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    assert len(starts) > 4
    for start, end in itertools.pairwise(starts):
        for cut in (start, start + 12, (start + end) // 2, end - 1):
            with pytest.raises(RejectedSample) as raised:
                decode(data[:cut].removesuffix(b"\xff") + b"\xff\xd9", "x")
            assert raised.value.reason == Reason.UNREADABLE_IMAGE


def test_the_half_grey_image_of_a_bug_report_is_rejected():
    with pytest.raises(RejectedSample, match="truncated"):
        decode((CASES / "base_trunc_plus_EOI.jpg").read_bytes(), "x")


def test_damaged_jpegs_are_decoded_or_rejected():
    data = jpeg(photo(40, 60))
    draw = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data)
        for place in draw.integers(2, len(data), 3):
            damaged[place] = draw.integers(256)
        try:
            decode(bytes(damaged[: draw.integers(len(data) // 2, len(data))]), "x")
        except RejectedSample as rejected:
            assert rejected.sentence


def png_with(*chunks: tuple[bytes, bytes], after: bool = False) -> bytes:
    """A PNG of 40 x 60 pixels with further chunks before or after its pixels."""
    file = io.BytesIO()
    photo(60, 40).save(file, "PNG")
    data = file.getvalue()
    place = data.index(b"IEND" if after else b"IDAT") - 4
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return data[:place] + b"".join(written) + data[place:]


TEXT = bytes(range(32, 127)) * 40_000  # 3.8 MB
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/>'
    + b"<!-- "
    + TEXT
    + b" --></x:xmpmeta>"
)
TEXTS = {
    "zTXt": [(b"zTXt", b"Comment\0\0" + zlib.compress(TEXT))],
    "iTXt": [(b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(TEXT))],
    "plain": [(b"tEXt", b"Comment\0" + TEXT), (b"iTXt", b"Comment\0\0\0\0\0" + TEXT)],
    "much in all": [(b"tEXt", b"Comment\0" + TEXT)] * 20,
    "bomb": [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20)))],
    "colour profile": [(b"iCCP", b"profile\0\0" + zlib.compress(TEXT))],
    "broken": [(b"zTXt", b"Comment\0\0no zlib"), (b"iTXt", b"Comment"), (b"tEXt", b"")],
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("chunks", TEXTS.values(), ids=TEXTS)
def test_pngs_with_much_text_are_read(chunks, after):
    data = png_with(*chunks, after=after)
    assert (np.asarray(decode(data, "x")) == np.asarray(photo(60, 40))).all()
    assert header_size(data, "x") == (60, 40)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    ],
    ids=["plain", "compressed"],
)
def test_the_orientation_in_a_long_text_is_kept(chunk, after):
    data = png_with(chunk, after=after)
    assert header_size(data, "x") == (40, 60)
    upright = np.rot90(np.asarray(photo(60, 40)), -1)
    assert (np.asarray(decode(data, "x")) == upright).all()


def test_the_orientation_in_a_compressed_exif_text_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 3
    raw = exif.tobytes()
    body = f"\nexif\n{len(raw):8d}\n{raw.hex()}\n".encode() + b"\n" * (2 << 20)
    data = png_with((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(body)))
    assert (np.asarray(decode(data, "x")) == np.asarray(photo(60, 40))[::-1, ::-1]).all()


def test_the_png_text_of_a_bug_report_is_read():
    data = (CASES / "bigtext.png").read_bytes()
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data))
    assert decode(data, "x").size == (320, 256)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20  # the limit of the process stays as it is


def test_training_and_verify_find_images_that_passed_a_header_check(bench, new_sample):
    (bench.path / "images").mkdir()
    for name, data in (("good.jpg", jpeg()), ("half.jpg", closed(jpeg(), 0.5))):
        (bench.path / "images" / name).write_bytes(data)
    records = [new_sample("<image>q", name, image=name) for name in ("good.jpg", "half.jpg")]
    shards = bench.preprocess(records, settings=dataclasses.replace(bench.settings, check="header"))
    assert len(shards) == 2
    (damage,) = verify(shards.location).damage
    assert "record 1" in damage.sentence and "truncated" in damage.sentence
    item = PackDataset(bench.pack(512), 1, seed=0)[0]
    assert item["samples"] == 2 and len(item["broken"]) == 1 and "record 1" in item["broken"][0]
    assert len(bench.preprocess(records, "decoded")) == 1


def with_scans(more: int, size: tuple[int, int]) -> bytes:
    """A progressive JPEG whose last scan is repeated so many times."""
    data = jpeg(Image.new("RGB", size, "red"), progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * more + data[end:]


def test_endless_scans_are_rejected_before_decoding():
    decode(with_scans(6, (4000, 3000)), "usual.jpg")
    decode(with_scans(500, (320, 240)), "small.jpg")
    with pytest.raises(RejectedSample, match="slow.jpg .* more than 16 scans of 12000000 pixels take too long"):
        decode(with_scans(100, (4000, 3000)), "slow.jpg")
    Image.open(io.BytesIO(with_scans(100, (4000, 3000)))).load()  # Pillow takes it


def test_webp_has_its_own_pixel_limit():
    """Its decoder takes twice the memory of the others."""
    file = io.BytesIO()
    Image.new("RGB", (16383, 4200), "white").save(file, "WEBP", lossless=True, quality=0, method=0)
    assert len(file.getvalue()) < 1000
    for read in (decode, header_size):
        with pytest.raises(RejectedSample, match="bomb.webp has 16383 x 4200 pixels, more than 67108864"):
            read(file.getvalue(), "bomb.webp")
