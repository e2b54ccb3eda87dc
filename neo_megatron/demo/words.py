"""Groups the pieces of a streamed answer into words."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from neo_megatron.inference.answering import Piece


@dataclass
class Word:
    """``text`` with the white space in front of it; ``tokens``: indices of its tokens in the answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)


def words_of(pieces: Iterable[Piece]) -> list[Word]:
    """Joins pieces to words: white space separates them; scripts that write none are shown by their tokens."""
    words: list[Word] = []
    count = 0
    for piece in pieces:
        if not words or _begins_word(words[-1].text, piece.text):
            words.append(Word())
        words[-1].text += piece.text
        words[-1].tokens += range(count, count + len(piece.tokens))
        count += len(piece.tokens)
    return words


def _begins_word(before: str, text: str) -> bool:
    if not before.strip() or not text:
        return False  # white space belongs to the word after it
    if before[-1].isspace() or text[0].isspace() or _stands_alone(text[0]):
        return True
    return _stands_alone(before[-1]) and text[0].isalnum()  # punctuation belongs to the word before it


def _stands_alone(character: str) -> bool:
    """Whether a character is Chinese, Japanese or Korean."""
    return character.isalpha() and unicodedata.east_asian_width(character) in "WF"
