"""Queries of a step and images, compared with the mask that they stand for."""

import numpy as np
import pytest

from neo_megatron.vllm_plugin.spans import begins_in_an_image_that_is_cut, spans_of

IMAGES = [(4, 9), (10, 10), (14, 19)]
TOTAL = 24


def sees(images, total):
    """`[total, total]`: a query sees the keys before it, itself, and its image."""
    place = np.arange(total)
    mask = place[None] <= place[:, None]
    for first, last in images:
        inside = (place >= first) & (place <= last)
        mask |= inside[None] & inside[:, None]
    return mask


@pytest.mark.parametrize("computed", range(TOTAL))
def test_spans_stand_for_the_mask(computed):
    images = list(reversed(IMAGES))
    if begins_in_an_image_that_is_cut(computed, TOTAL, images):
        pytest.fail("no image ends after the last token")
    mask, place = np.zeros((TOTAL, TOTAL), dtype=bool), computed
    for start, end, causal in spans_of(computed, TOTAL, images):
        assert start == place < end
        for query in range(start, end):
            mask[query, : query + 1 if causal else end] = True
        place = end
    assert place == TOTAL
    np.testing.assert_array_equal(mask[computed:], sees(IMAGES, TOTAL)[computed:])


def test_images_of_other_steps_are_left_out():
    assert spans_of(20, 24, IMAGES) == [(20, 24, True)]
    assert spans_of(0, 4, IMAGES) == [(0, 4, True)]
    assert spans_of(3, 3, IMAGES) == []


def test_a_cut_image_is_an_error():
    with pytest.raises(RuntimeError, match="the image of tokens 14 to 19 is cut at 16"):
        spans_of(12, 16, IMAGES)


@pytest.mark.parametrize(
    ("computed", "total", "cut"),
    [
        (4, 9, True),  # all of the image is new, and the step ends one token before its end
        (4, 10, False),
        (7, 9, True),  # its first tokens are in the cache
        (7, 10, False),
        (3, 9, False),  # the step begins before it: vLLM ends it there by itself
        (11, 16, False),
        (10, 11, False),
    ],
)
def test_a_step_that_begins_in_an_image_reaches_its_end(computed, total, cut):
    assert begins_in_an_image_that_is_cut(computed, total, IMAGES) == cut
