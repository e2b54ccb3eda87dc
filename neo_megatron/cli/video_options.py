"""Options that say how the frames of a video are written into the text, and how large they are."""

import argparse
from typing import Any, get_args

from neo_megatron.data.config import PreprocessConfig, VideoText


def add_video(parser: argparse._ActionsContainer) -> None:
    """Adds --video-text, --video-min-pixels and --video-max-pixels."""
    parser.add_argument(
        "--video-text",
        choices=get_args(VideoText),
        default=PreprocessConfig.video_text,
        help="the text of a video: frames is Frame-1: <image> and so on; timestamps is the length of the video and the "
        "time in front of each frame, as NEO-ov is trained; images is <image> on a line each; frame-timestamps is the "
        "same as timestamps with numbers, as NEO-ov's spatial class is asked (%(default)s)",
    )
    parser.add_argument(
        "--video-min-pixels",
        type=int,
        default=PreprocessConfig.video_min_pixels,
        metavar="PIXELS",
        help="smaller frames of videos are enlarged to this area; at least 1, or 0 for --min-pixels (%(default)s)",
    )
    parser.add_argument(
        "--video-max-pixels",
        type=int,
        default=PreprocessConfig.video_max_pixels,
        metavar="PIXELS",
        help="larger frames of videos are reduced to this area, each for itself, and images do not share their limit "
        "with them; at least 1, or 0 for --max-pixels, which the images and frames of a sample share (%(default)s)",
    )


def video_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `PreprocessConfig` that these options set."""
    return {name: getattr(arguments, name) for name in ("video_text", "video_min_pixels", "video_max_pixels")}
