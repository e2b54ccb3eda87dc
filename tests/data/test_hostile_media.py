"""Small files that would take minutes or gigabytes are rejected with their limit, wherever images are read.

`python tests/hostile_images.py` prints what decoding each takes.
"""

import io
import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import hostile_images
from support.hostile_images import HOSTILE, measured

from neo_megatron.data import image_limits
from neo_megatron.data.image import decode, decode_opened, header_size
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.hf.image_processing_neo import NEOImageProcessor
from neo_megatron.inference.prompts import new_prompt

_MEMORY = 1 << 29  # bytes that a refusal may take; many of these would take as much or more
_SECONDS = 60  # of processor time, a hundred times what refusing one takes
# Making these takes seconds, or Pillow takes as long to open them.
_LARGE = [
    name for name in HOSTILE if any(word in name for word in ("64 MB", "32 million", "2 million", "digits", "2,000"))
]
REFUSED = [name for name, (_, words) in HOSTILE.items() if words and name not in _LARGE]
# What a user opens with Pillow, which is then given to a processor, is opened without our limits.
OPENED = [
    *("WebP of 34 bytes, 67 megapixels", "progressive JPEG, 300 scans of 4 megapixels"),
    *("TIFF, tiles far larger than the image", "BMP, runs of a pixel", "PPM with a maximum of 254"),
    *("JPEG 2000, 65,535 layers", "AVIF, 25 megapixels"),
]


def in_limits(run: Callable[[], str]) -> str:
    """The result of a function in a process with limited memory and CPU time."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        try:
            os.write(sender, run().encode())
        finally:
            os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


def refusal(read: Callable, *arguments) -> str:
    """The message of a rejection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(*arguments)
        except RejectedSample as rejected:
            assert rejected.reason == Reason.DECOMPRESSION_BOMB
            return rejected.sentence
        except ValueError as error:
            return str(error)
    return "it was shown"


@pytest.mark.parametrize("name", REFUSED)
def test_costly_images_are_rejected_with_their_limit(name):
    make, words = HOSTILE[name]
    data = make()
    sentences = [in_limits(lambda read=read: refusal(read, data, "x.img")) for read in (decode, header_size)]
    assert sentences[0].startswith("the image x.img ") and words in sentences[0]
    assert sentences[0] == sentences[1]


@pytest.mark.thorough
@pytest.mark.parametrize("name", _LARGE)
def test_costly_large_images_are_rejected(name):
    test_costly_images_are_rejected_with_their_limit(name)


@pytest.mark.parametrize("name", [name for name, (_, words) in HOSTILE.items() if not words])
def test_images_that_only_look_hostile_are_decoded_quickly(name):
    outcome, seconds, memory = measured(HOSTILE[name][0](), _SECONDS)
    assert " x " in outcome and memory < 1 << 29


@pytest.mark.parametrize("name", OPENED)
def test_an_opened_image_is_rejected_before_it_is_decoded(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(HOSTILE[name][0]()))
    assert HOSTILE[name][1] in in_limits(lambda: refusal(decode_opened, image, "x.img"))


def test_processor_prompts_and_preprocessing_have_the_same_limits(bench, new_sample, tmp_path):
    names = REFUSED[:3] + OPENED[2:4]
    (bench.path / "images").mkdir()
    for number, name in enumerate(names):
        path = bench.path / "images" / f"{number}.img"
        path.write_bytes(HOSTILE[name][0]())
        for read in (
            lambda path=path: NEOImageProcessor()(str(path)),
            lambda path=path: NEOImageProcessor()({"bytes": path.read_bytes()}),
            lambda path=path: new_prompt("What?", [path], bench.settings),
        ):
            assert HOSTILE[name][1] in refusal(read), name
    bench.preprocess(
        [new_sample("<image>", "x", image=f"{number}.img") for number in range(len(names))] + [new_sample()]
    )
    assert [reject["kind"] for reject in bench.rejects()] == [Reason.DECOMPRESSION_BOMB] * len(names)


def test_an_export_carries_the_limits(tmp_path):
    NEOImageProcessor().save_pretrained(tmp_path)
    code = (tmp_path / "image_limits_neo.py").read_text()
    assert "neo_megatron" not in "".join(line for line in code.splitlines() if "import" in line)
    assert "from .image_limits_neo import" in (tmp_path / "images_neo.py").read_text()


def test_usual_files_stay_within_the_limits():
    """The largest of each kind that programs write, with a margin."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    noise, plain = Image.fromarray(pixels), Image.new("RGB", (4096, 4096), "red")
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    for image, kind, options in (
        (noise, "JPEG", {"progressive": True, "exif": exif, "icc_profile": bytes(1_000_000)}),
        (noise, "TIFF", {"compression": "jpeg"}),
        (noise, "TIFF", {"compression": "tiff_lzw"}),
        (noise, "JPEG2000", {"quality_layers": list(range(20, 0, -1)), "irreversible": True}),
        (noise, "JPEG2000", {"tile_size": (64, 64), "precinct_size": (64, 64), "codeblock_size": (16, 16)}),
        (noise.quantize(), "GIF", {"comment": b"c" * 60_000}),
        (noise.quantize(), "BMP", {}),
        (noise, "PPM", {}),
        (plain, "WEBP", {"lossless": True, "method": 0}),
        (plain.resize((1000, 1000)), "AVIF", {"speed": 10}),
        (plain, "PNG", {}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        assert decode(file.getvalue(), kind).size == image.size
        assert header_size(file.getvalue(), kind) == image.size[::-1]
    assert decode(hostile_images.ppm(800, 600, 254), "a.ppm").size == (800, 600)
    chunks = hostile_images.png_chunks(20_000)
    assert decode(chunks, "chunks.png").size == (8, 8)
    assert decode(hostile_images.jpeg_segments(2000, b"\xff\xe5\0\2"), "segments.jpg").size == (8, 8)


def test_scans_hidden_between_segments_are_counted():
    """An end marker in a comment does not end the file, and a scan marker in a table does not count."""
    data = hostile_images.jpeg_scans(0, 64)
    end = data.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + (2 + 4 * 40).to_bytes(2, "big") + b"\xff\xd9\xff\xda" * 40
    with_comment = data[:end] + comment + data[end:]
    assert decode(with_comment, "comment.jpg").size == (64, 64)
    kinds = [kind for kind, _, _ in image_limits.jpeg_segments(with_comment)]
    assert kinds.count(0xDA) == [kind for kind, _, _ in image_limits.jpeg_segments(data)].count(0xDA)
