"""Images in the tokens that a step computes of a request: where they begin and end, and whether they are cut.

An image is given by its first and last token, counted in its request.
"""

from collections.abc import Iterable

Image = tuple[int, int]
Span = tuple[int, int, bool]
"""Queries of one kind: where they begin and end in their request, and whether they are causal."""


def spans_of(computed: int, total: int, images: Iterable[Image]) -> list[Span]:
    """The queries from ``computed`` to ``total``, cut at images: text is causal, an image is not.

    A query of an image sees all keys up to the image's end, which is where its span ends.

    Raises:
        RuntimeError: an image of which a later step would compute the end, so that its tokens would not see it.
    """
    spans: list[Span] = []
    place = computed
    for first, last in sorted(images):
        start, end = max(first, computed), last + 1
        if end <= computed or first >= total:
            continue
        if end > total:
            raise RuntimeError(f"the image of tokens {first} to {last} is cut at {total}: run NEO's own scheduler")
        if place < start:
            spans.append((place, start, True))
        spans.append((start, end, False))
        place = end
    if place < total:
        spans.append((place, total, True))
    return spans


def begins_in_an_image_that_is_cut(computed: int, total: int, images: Iterable[Image]) -> bool:
    """Whether the first query, token ``computed``, is in an image of which the last token is not computed."""
    return any(first <= computed <= last and last >= total for first, last in images)
