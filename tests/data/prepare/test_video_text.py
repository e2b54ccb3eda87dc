"""The text of a video, as the published kit of NEO-ov writes it."""

from fractions import Fraction

import pytest

from neo_megatron.data.prepare.video_text import text_of_clip
from neo_megatron.data.video import Clip


def clip(end: Fraction | int, *times: Fraction | int) -> Clip:
    return Clip("a.mp4", tuple(map(Fraction, times)), Fraction(end), Fraction(end))


def test_frames_are_numbered():
    assert text_of_clip(clip(3, 0, 1, 2), "frames") == "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>"


def test_timestamps_are_those_of_the_published_prompt():
    """Three frames of 300 at 25 a second, as the kit's own function prints them."""
    text = (
        "The time range of this video is [00:00-00:12], and the following is a series of 3 frames sampled at 0.2 FPS.\n"
        "[00:03.00]:<image>\n[00:06.00]:<image>\n[00:09.00]:<image>"
    )
    assert text_of_clip(clip(12, 3, 6, 9), "timestamps") == text


def test_frames_without_numbers_and_with_numbers_and_times():
    assert text_of_clip(clip(3, 0, 1), "images") == "<image>\n<image>"
    head, *lines = text_of_clip(clip(12, 3, 6), "frame-timestamps").splitlines()
    assert head == text_of_clip(clip(12, 3, 6), "timestamps").splitlines()[0]
    assert lines == ["Frame1 is at [00:03.00]:<image>", "Frame2 is at [00:06.00]:<image>"]


@pytest.mark.parametrize(
    ("end", "times", "head", "stamps"),
    [
        (1, [0], "[00:00-00:01], and the following is a series of 1 frames sampled at 1.0 FPS", ["00:00.00"]),
        (3725, [0, 3661], "[00:00-62:05], and the following is a series of 2 frames sampled at 0.0 FPS", ["61:01.00"]),
        (Fraction(5999, 100), [Fraction(59996, 1000)], "[00:00-00:59], ", ["01:00.00"]),
        (Fraction(2, 5), [0, Fraction(1, 3)], "[00:00-00:00], ", ["00:00.33"]),
        (0, [0], "[00:00-00:00], and the following is a series of 1 frames sampled at 1.0 FPS", ["00:00.00"]),
    ],
)
def test_minutes_go_beyond_an_hour_and_seconds_are_rounded(end, times, head, stamps):
    lines = text_of_clip(clip(end, *times), "timestamps").splitlines()
    assert head in lines[0] and len(lines) == 1 + len(times)
    assert lines[-1] == f"[{stamps[-1]}]:<image>"
