"""The text that takes the place of a video's tag: a line with an ``<image>`` tag for each of its frames."""

from collections.abc import Callable
from fractions import Fraction

from neo_megatron.data.config import VideoText
from neo_megatron.data.tags import IMAGE_TAG
from neo_megatron.data.video import Clip


def text_of_clip(clip: Clip, form: VideoText) -> str:
    """The lines of the frames of a clip, without a line break at the end."""
    return _FORMS[form](clip)


def _frames(clip: Clip) -> str:
    return "\n".join(f"Frame-{number}: {IMAGE_TAG}" for number in range(1, len(clip.times) + 1))


def _images(clip: Clip) -> str:
    """As the published NEO-ov is asked about videos without times, such as those of MVBench."""
    return "\n".join([IMAGE_TAG] * len(clip.times))


def _timestamps(clip: Clip) -> str:
    """As the published NEO-ov is asked (``VLMEvalKit_ov``, ``build_video_prompt`` and the data sets of long videos)."""
    return "\n".join([_time_range(clip), *(f"[{_stamp(time)}]:{IMAGE_TAG}" for time in clip.times)])


def _frame_timestamps(clip: Clip) -> str:
    """As the spatial class of the published NEO-ov is asked about videos with times."""
    frames = enumerate(clip.times, start=1)
    lines = (f"Frame{number} is at [{_stamp(time)}]:{IMAGE_TAG}" for number, time in frames)
    return "\n".join([_time_range(clip), *lines])


def _time_range(clip: Clip) -> str:
    count = len(clip.times)
    minutes, seconds = divmod(int(clip.end), 60)
    rate = round(float(count / clip.end), 1) if clip.end else float(count)
    return (
        f"The time range of this video is [00:00-{minutes:02d}:{seconds:02d}], and the following is a series of "
        f"{count} frames sampled at {rate} FPS."
    )


def _stamp(time: Fraction) -> str:
    """``MM:SS.ff``; there are no hours, so minutes go beyond 60."""
    minutes, hundredths = divmod(round(time * 100), 6000)
    return f"{minutes:02d}:{hundredths // 100:02d}.{hundredths % 100:02d}"


_FORMS: dict[VideoText, Callable[[Clip], str]] = {
    "frames": _frames,
    "timestamps": _timestamps,
    "images": _images,
    "frame-timestamps": _frame_timestamps,
}
