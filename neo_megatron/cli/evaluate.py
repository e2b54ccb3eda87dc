"""Asks a NEO the questions of annotation files and scores its answers: exact match, and ANLS (Biten et al. 2019).

neo-megatron evaluate --model neo --input test.json --image-root images --output evaluation
neo-megatron evaluate --model neo --registry registry.yaml --datasets docvqa chartqa%10 --output evaluation

Every turn that training would train on is a question; the turns before it, as they are written, are its prompt. Its
text is right, and so is what it lists under "answers". Letter case and white space do not count. Decoding is greedy.

The output holds answers.jsonl, scores.json, rejects.jsonl and report.html, a page of the worst answers with their
images. The same command continues a run that was interrupted, also with another --batch-size or --workers.
"""

import argparse
from pathlib import Path

from neo_megatron.atomic_files import json_line
from neo_megatron.cli.model_options import add_batches, add_model, check_arguments, quiet, task_of
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.inference.answer_run import ANSWERS, AnswerRun
from neo_megatron.inference.batches import answer_all, plan_of
from neo_megatron.inference.evaluation import Evaluation, evaluate_answers
from neo_megatron.inference.questions import read_questions
from neo_megatron.inference.report_page import page


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", help="annotation file: a JSON array, or .jsonl with one record a line")
    inputs.add_argument("--registry", help="YAML file that maps names to data sets")
    parser.add_argument("--datasets", nargs="+", help="names in the registry, each with an optional share: name%%10")
    parser.add_argument("--image-root", default="", help="directory of the images of --input, which none may leave")
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    add_batches(parser)
    add_model(parser, max_new_tokens=128)
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    if bool(arguments.registry) != bool(arguments.datasets):
        parser.error("--registry and --datasets go together")
    if arguments.registry and arguments.image_root:
        parser.error("--image-root goes with --input; a registry has data_path")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    quiet()
    if arguments.registry:
        sources = data_list(arguments.datasets, arguments.registry)
    else:
        sources = [Source(Path(arguments.input).stem, arguments.input, arguments.image_root)]
    task, workers = task_of(arguments, {})
    with AnswerRun(arguments.output, plan_of(task, sources, "every answer")) as run:
        listed = read_questions(sources, task.settings, "every answer")
        answer_all(listed.questions, task, run, arguments.batch_size, workers)
        evaluation = evaluate_answers(listed, run.done)
        run.finish(
            {
                ANSWERS: b"".join(map(json_line, evaluation.lines)),
                REJECTS: b"".join(map(json_line, evaluation.rejects)),
                "scores.json": json_line(evaluation.summary(), indent=1),
                "report.html": page(evaluation, str(arguments.model)).encode(errors="backslashreplace"),
            }
        )
    for sentence in listed.noticed.sentences():
        print(sentence)
    print_scores(evaluation)
    print(f"the page to look at: {(arguments.output / 'report.html').resolve()}")


def print_scores(evaluation: Evaluation) -> None:
    print(f"\n{'data set':24} questions  exact match    ANLS")
    for name, scores in (*evaluation.data_sets.items(), ("all questions", evaluation.total)):
        print(f"{name:24} {scores.questions:9,}  {scores.exact_match:10.2%}  {scores.anls:7.4f}")
    if evaluation.total.cut:
        print(f"{evaluation.total.cut:,} answers were cut at --max-new-tokens")
    if evaluation.rejects:
        print(f"{len(evaluation.rejects):,} samples were rejected and not asked; they are listed in {REJECTS}")
