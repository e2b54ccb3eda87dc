"""Answers the questions of annotation files with a NEO and scores them: exact match, and ANLS (Biten et al. 2019).

neo-megatron evaluate --model neo --input test.json --image-root images --output evaluation
neo-megatron evaluate --model neo --registry registry.yaml --datasets docvqa chartqa%10 --output evaluation

Every turn that training would train on is a question; the turns before it, as written, are its prompt. Correct answers
are the text of the turn, and those that it lists under "answers". Case and white space are ignored, and so is thinking,
all up to </think>. Decoding is greedy.

The output has answers.jsonl, scores.json, rejects.jsonl and report.html, a page of the worst answers with their images.
The same command continues an interrupted run, also with another --batch-size or --workers.
"""

import argparse
from pathlib import Path

from neo_megatron.cli.model_options import add_batches, add_model, check_arguments, quiet, task_of
from neo_megatron.cli.prompt_options import add_prompts
from neo_megatron.cli.source_options import add_sources, check_sources, chosen_sources
from neo_megatron.data.manifest import REJECTS
from neo_megatron.inference.evaluate import REPORT, evaluate
from neo_megatron.inference.evaluation import Evaluation


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new directory for answers, scores and report, or that of an unfinished run",
    )
    add_prompts(parser)
    add_batches(parser)
    add_model(parser, max_new_tokens=128)
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    check_sources(parser, arguments)
    return arguments


def main() -> None:
    """Answers all questions, writes the output and prints the scores."""
    arguments = parse_arguments()
    quiet()
    sources = chosen_sources(arguments)
    task, workers = task_of(arguments, {})
    listed, evaluation = evaluate(task, sources, arguments.output, arguments.batch_size, workers, str(arguments.model))
    for sentence in listed.noticed.sentences():
        print(sentence)
    print_scores(evaluation)
    print(f"the page to look at: {(arguments.output / REPORT).resolve()}")


def print_scores(evaluation: Evaluation) -> None:
    """Prints a table of the scores of each data set, and how many answers were cut and samples rejected."""
    print(f"\n{'data set':24} questions  exact match    ANLS")
    for name, scores in (*evaluation.data_sets.items(), ("all questions", evaluation.total)):
        print(f"{name:24} {scores.questions:9,}  {scores.exact_match:10.2%}  {scores.anls:7.4f}")
    if evaluation.total.cut:
        print(f"{evaluation.total.cut:,} answers were cut at --max-new-tokens")
    if evaluation.rejects:
        print(f"{len(evaluation.rejects):,} samples were rejected and not asked; they are listed in {REJECTS}")
