"""The questions of the serving benchmark, and their answers in batches in a process of its own.

    python -m neo_megatron.benchmarks.serve_questions MODEL REGISTRY COUNT BATCH STREAMED

Prints JSON with the arguments of `serve.Measured`.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import logging

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.registry import data_list
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.batches import make_batches
from neo_megatron.inference.prompts import prompt_of_sample
from neo_megatron.inference.questions import Question, read_questions

DATA_SET = "test"
MAX_NEW_TOKENS = 12


def chosen_questions(registry: Path, count: int) -> list[Question]:
    """That many of the quickstart's test questions, evenly spread over all, or all of them if they are fewer."""
    questions = read_questions(data_list([DATA_SET], registry), PreprocessConfig(), "every answer").questions
    count = min(count, len(questions))
    return [questions[number * len(questions) // count] for number in range(count)]


def answer(answerer: Answerer, questions: Sequence[Question], batch: int) -> list[str]:
    """The answers in the order of the questions; images are read and resized for each batch."""
    answers = [""] * len(questions)
    for numbers in make_batches(questions, batch):
        asked = [questions[number] for number in numbers]
        prompts = [prompt_of_sample(one.sample, one.turn, answerer.settings) for one in asked]
        for number, said in zip(numbers, answerer.answer(prompts, MAX_NEW_TOKENS), strict=True):
            answers[number] = said.text
    return answers


def seconds_to_first(answerer: Answerer, question: Question) -> float:
    """Seconds from a question to the first token of its answer, which is generated to its end."""
    start = time.perf_counter()
    prompt = prompt_of_sample(question.sample, question.turn, answerer.settings)
    times = [time.perf_counter() - start for _ in answerer.stream(prompt, MAX_NEW_TOKENS)]
    return times[0]


def main() -> None:
    """Answers and prints what it took."""
    model, registry = map(Path, sys.argv[1:3])
    count, batch, streamed = map(int, sys.argv[3:])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    questions = chosen_questions(registry, count)
    answerer = Answerer(model)
    answer(answerer, questions[:1], batch)
    first = [seconds_to_first(answerer, question) for question in questions[:streamed]]
    start = time.perf_counter()
    answers = answer(answerer, questions, batch)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"answers": answers, "seconds": seconds, "first": first, "memory": memory}))


if __name__ == "__main__":
    main()
