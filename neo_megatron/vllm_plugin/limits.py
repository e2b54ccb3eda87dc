"""Limits of pixels of a server and of its requests."""

import math
from collections.abc import Mapping
from typing import Any

from neo_megatron.data.image import IMAGE_TOKEN_SIDE

LIMITS = ("min_pixels", "max_pixels")
_LONGEST = 200  # an image may be so many times as long as it is wide


def checked_limits(settings: Mapping[str, Any]) -> dict[str, int]:
    """The limits of pixels among the `mm_processor_kwargs` of a server or a request.

    Raises:
        ValueError: another setting, or a limit that is not a number.
    """
    for name, value in settings.items():
        if name not in LIMITS:
            raise ValueError(f"mm_processor_kwargs has {name!r}: NEO knows {' and '.join(LIMITS)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} of {value!r} in mm_processor_kwargs: must be a number of pixels")
    return dict(settings)


def most_tokens(min_pixels: int, max_pixels: int) -> int:
    """No image takes more tokens; the longest ones exceed the limits the most."""
    shrunk = max(max_pixels // IMAGE_TOKEN_SIDE**2, math.isqrt(_LONGEST * max_pixels) // IMAGE_TOKEN_SIDE)
    sides = (math.ceil(math.sqrt(min_pixels * ratio) / IMAGE_TOKEN_SIDE) + 1 for ratio in (_LONGEST, 1 / _LONGEST))
    return max(shrunk, math.prod(sides))
