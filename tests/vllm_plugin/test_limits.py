"""Limits of pixels, and the number of tokens that they allow."""

import pytest

from neo_megatron.data.image import IMAGE_TOKEN_SIDE, smart_resize
from neo_megatron.vllm_plugin.limits import checked_limits, most_tokens


@pytest.mark.parametrize("limits", [(65536, 4194304), (4096, 65536), (16384, 16384), (1 << 20, 1 << 21)])
def test_no_image_takes_more_tokens(limits):
    sizes = [(short, short * ratio) for short in (1, 2, 3, 7, 31, 64, 500, 2000) for ratio in (1, 1.5, 3, 20, 99, 200)]
    sizes += [(199, 1), (200, 1), (45, 9000), (33, 33), (1023, 1025)]
    most = 0
    for height, width in sizes:
        new = smart_resize(height, int(width), IMAGE_TOKEN_SIDE, *limits)
        most = max(most, new[0] * new[1] // IMAGE_TOKEN_SIDE**2)
    assert most <= most_tokens(*limits) <= 3 * most


def test_limits_are_numbers_of_pixels():
    assert checked_limits({"max_pixels": 65536}) == {"max_pixels": 65536}
    with pytest.raises(ValueError, match="mm_processor_kwargs has 'size': NEO knows min_pixels and max_pixels"):
        checked_limits({"size": 3})
    for wrong in (0, -5, True, "65536", 3.5, None):
        with pytest.raises(ValueError, match=r"max_pixels of .* in mm_processor_kwargs: must be a number of pixels"):
            checked_limits({"max_pixels": wrong})
