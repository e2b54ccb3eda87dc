"""Answers the questions of annotation files, scores the answers, and writes the directory of an evaluation."""

from collections.abc import Sequence
from pathlib import Path

from neo_megatron.atomic_files import json_line
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.prepare.registry import Source
from neo_megatron.inference.answer_run import ANSWERS, AnswerRun
from neo_megatron.inference.batches import Task, answer_all, plan_of
from neo_megatron.inference.evaluation import Evaluation, evaluate_answers
from neo_megatron.inference.questions import QuestionList, read_questions
from neo_megatron.inference.report_page import page

SCORES, REPORT = "scores.json", "report.html"


def evaluate(
    task: Task,
    sources: Sequence[Source],
    output: Path,
    batch_size: int,
    workers: int,
    model: str,
    listed: QuestionList | None = None,
) -> tuple[QuestionList, Evaluation]:
    """Writes a complete evaluation, or continues one that was interrupted.

    Args:
        task: the model and how it is asked.
        sources: annotation files with their schemas.
        output: new directory, or that of an interrupted run with the same task and sources.
        batch_size: questions answered together.
        workers: processes, each with a model of its own.
        model: its name on the page.
        listed: the questions, if they were read already.

    Raises:
        DataError: as `AnswerRun`, `read_questions` and `answer_all`.
    """
    with AnswerRun(output, plan_of(task, sources, "every answer")) as run:
        listed = listed or read_questions(sources, task.settings, "every answer")
        answer_all(listed.questions, task, run, batch_size, workers)
        evaluation = evaluate_answers(listed, run.done)
        run.finish(
            {
                ANSWERS: b"".join(map(json_line, evaluation.lines)),
                REJECTS: b"".join(map(json_line, evaluation.rejects)),
                SCORES: json_line(evaluation.summary(), indent=1),
                REPORT: page(evaluation, model).encode(errors="backslashreplace"),
            }
        )
    return listed, evaluation
