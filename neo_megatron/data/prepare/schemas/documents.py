"""Documents: samples whose complete text is trained on, without turns of a chat."""

from collections.abc import Sequence

import numpy as np

from neo_megatron.data.chat import TokenizedSample
from neo_megatron.data.conversation import Turn


def document(text: str) -> list[dict[str, str]]:
    """The turns of a record that is a document; tags in the text are places for media."""
    return [{"from": "document", "value": text}]


def is_document(turns: Sequence[Turn]) -> bool:
    """Whether a checked sample is a document."""
    return bool(turns) and turns[0].role == "document"


def split_document(sample: TokenizedSample, limit: int) -> list[TokenizedSample]:
    """A document without images as consecutive samples of at most ``limit`` tokens, at least 2.

    The first token of a sample has nothing before it, so it cannot be a target. Each piece therefore begins with the
    last token of the piece before it: every token of the document but its first is a target exactly once.
    """
    tokens = sample.tokens
    if len(tokens) <= limit:
        return [sample]
    pieces = [tokens[start : start + limit] for start in range(0, len(tokens) - 1, limit - 1)]
    return [TokenizedSample(piece, np.array([[1, len(piece)]], np.int32)) for piece in pieces]
