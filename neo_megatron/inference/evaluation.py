"""Scores answers to questions with known answers, by data set and in total."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neo_megatron.inference.answer_run import Place
from neo_megatron.inference.metrics import score_answer
from neo_megatron.inference.questions import Question, QuestionList


@dataclass(frozen=True)
class Scores:
    """Means over questions that were asked.

    Args:
        questions: asked; those of rejected samples are not among them.
        exact_match, anls: from 0 to 1; 0 without questions.
        cut: answers that were cut at the token limit.
    """

    questions: int
    exact_match: float
    anls: float
    cut: int

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]]) -> "Scores":
        count = max(len(lines), 1)
        return cls(
            len(lines),
            sum(line["exact_match"] for line in lines) / count,
            sum(line["anls"] for line in lines) / count,
            sum(not line["finished"] for line in lines),
        )


@dataclass(frozen=True)
class Evaluation:
    """Every answer with its scores, in the order of the questions; rejected samples; means.

    Args:
        lines: of ``answers.jsonl``.
        rejects: of ``rejects.jsonl``.
        total, data_sets: scores of all answers, and of each data set, keyed by its name.
    """

    lines: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    total: Scores
    data_sets: dict[str, Scores]

    def summary(self) -> dict[str, Any]:
        return {
            **asdict(self.total),
            "rejected_samples": len(self.rejects),
            "data_sets": {name: asdict(scores) for name, scores in self.data_sets.items()},
        }


def evaluate_answers(listed: QuestionList, results: dict[Place, dict[str, Any]]) -> Evaluation:
    """Scores the results of all questions."""
    lines = []
    for line, question in answer_lines(listed.questions, results):
        score = score_answer(line["prediction"], question.references)
        lines.append({**line, "references": question.references, **asdict(score)})
    names = dict.fromkeys(question.source.name for question in listed.questions)
    by_set = {name: Scores.of([line for line in lines if line["data_set"] == name]) for name in names}
    return Evaluation(lines, all_rejects(listed, results), Scores.of(lines), by_set)


def answer_lines(
    questions: Iterable[Question], results: dict[Place, dict[str, Any]]
) -> Iterable[tuple[dict[str, Any], Question]]:
    """A line of ``answers.jsonl`` for each question that was asked."""
    for question in questions:
        result = results[question.place]
        if "rejected" not in result:
            yield (
                {
                    "data_set": question.source.name,
                    "file": question.source.annotations,
                    "record": question.record,
                    "element": question.element,
                    "turn": question.turn,
                    "id": question.id,
                    "pictures": tuple(map(str, question.sample.images)),
                    "question": question.text,
                    **result,
                },
                question,
            )


def all_rejects(listed: QuestionList, results: dict[Place, dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples left out while reading, then those of which an image could not be decoded, each once."""
    late = [results[question.place].get("rejected") for question in listed.questions]
    found = {(entry["file"], entry["record"], entry["element"]): entry for entry in late if entry}
    return [*listed.rejects, *found.values()]
