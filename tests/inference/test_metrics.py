"""The scores are those of the paper and of DocVQA's evaluation, on a plain table of edits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_megatron.inference.metrics import edit_distance, score_answer


def table_of_edits(first: str, second: str) -> int:
    """Levenshtein's table, entry by entry."""
    table = [[max(row, column) for column in range(len(second) + 1)] for row in range(len(first) + 1)]
    for row, left in enumerate(first, start=1):
        for column, right in enumerate(second, start=1):
            table[row][column] = min(
                table[row - 1][column] + 1, table[row][column - 1] + 1, table[row - 1][column - 1] + (left != right)
            )
    return table[-1][-1]


@given(st.text("abc é", max_size=12), st.text("abc é", max_size=12))
def test_edit_distance(first, second):
    assert edit_distance(first, second) == table_of_edits(first, second)


@given(st.text("ab ", max_size=8), st.lists(st.text("ab ", max_size=8), min_size=1, max_size=3))
def test_anls_follows_the_formula(said, references):
    """max over the references of 1 - NL where NL < 1/2, else 0."""
    tidy = [" ".join(text.split()) for text in (said, *references)]
    distances = [table_of_edits(tidy[0], text) / max(len(tidy[0]), len(text), 1) for text in tidy[1:]]
    score = score_answer(said, references)
    assert score.anls == pytest.approx(max(1 - distance if distance < 0.5 else 0 for distance in distances))
    assert score.exact_match == (tidy[0] in tidy[1:])


@pytest.mark.parametrize(
    ("said", "references", "exact_match", "anls"),
    [
        ("Paris", ["paris"], True, 1),
        (" new\n York ", ["New York City", "new york"], True, 1),
        ("facebok", ["Facebook"], False, 1 - 1 / 8),
        ("faceb", ["facebook"], False, 1 - 3 / 8),
        ("face", ["facebook"], False, 0),  # NL is exactly one half
        ("twitter", ["facebook"], False, 0),
        ("", ["no"], False, 0),
        ("", [""], True, 1),
        ("3.5", ["35"], False, 1 - 1 / 3),  # punctuation counts
        ("yes.", ["yes"], False, 1 - 1 / 4),
    ],
)
def test_published_examples(said, references, exact_match, anls):
    score = score_answer(said, references)
    assert (score.exact_match, score.anls) == (exact_match, pytest.approx(anls))


def test_long_texts_are_scored_quickly():
    """A table in Python would take a minute."""
    assert edit_distance("ab" * 3000, "ba" * 3000) == 2


@pytest.mark.parametrize(
    ("said", "references"),
    [
        ("<think>\nIs it 5? No.\n</think>\n\n4", ["4"]),
        ("<think>a</think> b </think> 4", ["4"]),
        ("4", ["<think>\nA sum.\n</think>\n\n4"]),
        ("<think>\n\n</think>\n\n4", ["<think>so</think>4", "5"]),
    ],
)
def test_thinking_is_not_scored(said, references):
    assert score_answer(said, references).exact_match and score_answer(said, references).anls == 1


def test_thinking_without_an_end_is_no_answer():
    assert not score_answer("<think>\n4", ["4"]).exact_match
