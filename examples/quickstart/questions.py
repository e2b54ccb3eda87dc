"""The questions of easy-VQA: their kinds, the best answers without the image, and accuracy by kind."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_TAG = "<image>\n"
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("what shape", "what colour", "yes or no, shape", "yes or no, colour")


@dataclass(frozen=True)
class Question:
    """A question about an image, with its right answer."""

    image: str
    text: str
    answer: str

    @property
    def kind(self) -> str:
        """See `kind_of_question`."""
        return kind_of_question(self.text)


@dataclass(frozen=True)
class Score:
    """How many of ``total`` questions of a kind were answered correctly, by the model and from their text alone."""

    kind: str
    total: int
    right: int
    text_only: int


def read_questions(annotations: Path) -> list[Question]:
    """All pairs of a question and its answer in an annotation file, in order."""
    return [question for record in json.loads(annotations.read_text()) for question in _of_record(record)]


def _of_record(record: dict) -> Iterator[Question]:
    turns = [turn["value"] for turn in record["conversations"]]
    for text, answer in zip(turns[0::2], turns[1::2], strict=True):
        yield Question(record["image"], text.removeprefix(IMAGE_TAG), answer)


def kind_of_question(text: str) -> str:
    """One of `KINDS`. Yes-or-no questions about a colour say "a blue shape"; only those about a shape name it."""
    if text.startswith("what "):
        return "what colour" if "color" in text else "what shape"
    return "yes or no, shape" if any(shape in text for shape in SHAPES) else "yes or no, colour"


def text_only_answers(training: Sequence[Question], asked: Sequence[Question]) -> list[str]:
    """The most frequent training answer to each question, or that of all questions if it is unknown."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for question in training:
        by_text[question.text][question.answer] += 1
    overall = Counter(question.answer for question in training)
    return [(by_text.get(question.text) or overall).most_common(1)[0][0] for question in asked]


def scores(asked: Sequence[Question], answers: Sequence[str], text_only: Sequence[str]) -> list[Score]:
    """The score of all questions, kind "all questions", then of each kind."""
    right, guessed, total = Counter(), Counter(), Counter()
    for question, answer, guess in zip(asked, answers, text_only, strict=True):
        for kind in ("all questions", question.kind):
            total[kind] += 1
            right[kind] += answer == question.answer
            guessed[kind] += guess == question.answer
    return [Score(kind, total[kind], right[kind], guessed[kind]) for kind in ("all questions", *KINDS)]
