"""Answer metrics: exact match, and ANLS of Biten et al., "Scene Text Visual Question Answering" (ICCV 2019).

Both compare texts as the evaluation server of ST-VQA and DocVQA does: in lower case, no white space around them, and
one blank for white space inside them. Punctuation, accents, articles and numbers count as they are written. Where
exactly half of the letters are wrong ANLS is 0, by the paper's formula; some evaluation kits count 0.5 there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.5
"""tau of the paper: a similarity below it is not a reading error but another answer."""


@dataclass(frozen=True)
class AnswerScore:
    """Scores of one answer: whether it matches a reference, and its ANLS from 0 to 1."""

    exact_match: bool
    anls: float


def score_answer(prediction: str, references: Sequence[str]) -> AnswerScore:
    """Compares an answer with each reference, both without thinking; the best score counts."""
    said = normalised(without_thinking(prediction))
    expected = [normalised(without_thinking(reference)) for reference in references]
    return AnswerScore(said in expected, max(_similarity(said, reference) for reference in expected))


def without_thinking(text: str) -> str:
    """The part of an answer that is not thinking: the text after its last ``</think>``."""
    return text.rpartition("</think>")[2]


def normalised(text: str) -> str:
    """Lower case, white space collapsed."""
    return " ".join(text.lower().split())


def _similarity(said: str, expected: str) -> float:
    """1 - NL, NL being the edit distance over the length of the longer text; 0 where NL is not below the threshold."""
    longer = max(len(said), len(expected))
    if longer == 0:
        return 1.0
    # There are at least as many edits as the lengths differ by, so most wrong answers need no table.
    if abs(len(said) - len(expected)) / longer >= THRESHOLD:
        return 0.0
    normalised_distance = edit_distance(said, expected) / longer
    return 1.0 - normalised_distance if normalised_distance < THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein: the fewest characters to insert, delete or exchange.

    A row of the table at a time: what insertions alone add along a row is a running minimum of ``distance - place``.
    """
    letters = np.array([ord(letter) for letter in second])
    places = np.arange(len(second) + 1)
    row = places
    for number, letter in enumerate(first, start=1):
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(np.append(number, above) - places) + places
    return int(row[-1])
