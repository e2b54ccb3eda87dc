"""Images and video frames of a sample, in the form in which shards store them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.image import decode, patches_from_image
from neo_megatron.data.prepare.media import load_media
from neo_megatron.data.prepare.records import Sample
from neo_megatron.errors import Reason, RejectedSample


def sample(*images: Path) -> Sample:
    return Sample((Turn("user", "<image>" * len(images), False),), tuple(map(str, images)))


@pytest.fixture
def photo(tmp_path, new_png) -> Path:
    """A JPEG stored sideways, with EXIF that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.open(io.BytesIO(new_png(300, 500))).save(path, exif=exif)
    return path


def test_header_check_and_decoding_give_the_same_media(photo):
    both = [load_media(sample(photo), PreprocessConfig(check=check)) for check in ("decode", "header")]
    (turns, decoded, grid), (same_turns, trusted, same_grid) = both
    assert turns == same_turns == sample(photo).turns
    assert decoded[0].tobytes() == trusted[0].tobytes() == photo.read_bytes()
    assert grid == same_grid == [(32, 18)]


def test_only_the_pixels_of_a_broken_image_pass_the_header_check(photo):
    photo.write_bytes(photo.read_bytes()[:-1000])
    assert load_media(sample(photo), PreprocessConfig(check="header"))[2] == [(32, 18)]
    for settings in (PreprocessConfig(), PreprocessConfig(check="header", image_store="patches")):
        with pytest.raises(RejectedSample) as raised:
            load_media(sample(photo), settings)
        assert raised.value.reason == Reason.UNREADABLE_IMAGE
    photo.write_bytes(photo.read_bytes()[:100])
    with pytest.raises(RejectedSample, match="photo.jpg"):
        load_media(sample(photo), PreprocessConfig(check="header"))


@pytest.mark.parametrize("check", ["decode", "header"])
def test_long_strips_are_rejected_by_both_checks(tmp_path, check):
    path = tmp_path / "strip.png"
    Image.new("RGB", (2010, 10)).save(path)
    with pytest.raises(RejectedSample) as raised:
        load_media(sample(path), PreprocessConfig(check=check))
    assert raised.value.reason == Reason.ASPECT_RATIO


def test_patches_are_those_of_the_resized_image(photo):
    _, (stored,), (grid,) = load_media(sample(photo), PreprocessConfig(image_store="patches"))
    expected = patches_from_image(decode(photo.read_bytes(), "photo"), grid)
    assert stored.dtype == np.uint8 and (stored == expected.reshape(-1)).all()


def test_the_memory_of_a_sample_is_limited(photo, monkeypatch):
    monkeypatch.setattr("neo_megatron.data.prepare.media.MAX_SAMPLE_BYTES", 2 * photo.stat().st_size)
    load_media(sample(photo, photo), PreprocessConfig())
    with pytest.raises(RejectedSample) as raised:
        load_media(sample(photo, photo, photo), PreprocessConfig())
    assert raised.value.reason == Reason.OVER_LONG
