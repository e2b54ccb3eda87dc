"""Documents: samples whose complete text is trained on, without turns of a chat."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from neo_megatron.data.chat import TokenizedSample
from neo_megatron.data.conversation import Turn


class Piece(NamedTuple):
    """One of the consecutive samples into which a document is split.

    Args:
        sample: its tokens and trained ranges.
        images: of the document, that are in it.
    """

    sample: TokenizedSample
    images: slice


def document(text: str) -> list[dict[str, str]]:
    """The turns of a record that is a document; tags in the text are places for media."""
    return [{"from": "document", "value": text}]


def is_document(turns: Sequence[Turn]) -> bool:
    """Whether a checked sample is a document."""
    return bool(turns) and turns[0].role == "document"


def split_document(sample: TokenizedSample, image_start: int, limit: int) -> list[Piece]:
    """A document as consecutive samples of at most ``limit`` tokens, at least 2.

    The first token of a sample has nothing before it, so it cannot be a target. Each piece therefore ends with a token
    of text, with which the next one begins: every token of text but the first of the document is a target exactly once,
    and every image is in one piece, in front of the text that follows it. A piece ends in front of an image if one can,
    so that an image and the text up to the next image stay together where both fit; else it ends within a text. Images
    that follow each other directly are not separated: with the tokens around them they may be a piece above the limit.

    Args:
        sample: of a document, so that its trained ranges are the runs of text between images.
        image_start: the id of ``<img>``.
        limit: tokens of a piece.
    """
    tokens, spans = sample.tokens, sample.spans
    places = np.flatnonzero(tokens == image_start)
    pieces = []
    for start, end in _bounds(spans, len(tokens), limit):
        inside = np.clip(spans, start + 1, end) - start
        inside = inside[inside[:, 0] < inside[:, 1]]
        first, last = np.searchsorted(places, (start, end)).tolist()
        pieces.append(Piece(TokenizedSample(tokens[start:end], inside.astype(np.int32)), slice(first, last)))
    return pieces


def _bounds(spans: np.ndarray, length: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each piece of a document in tokens."""
    starts, ends = spans.T.astype(np.int64)
    start = 0
    while length - start > limit:
        most = start + limit
        run = int(np.searchsorted(ends, most, "right"))  # the first run of text that ends after `most`
        end = max(most, int(starts[run]) + 1)  # within this text; above the limit where images take all of the piece
        if run and ends[run - 1] > start + 1:
            end = int(ends[run - 1])
        yield start, end
        if end == length:
            return
        start = end - 1
    yield start, length
