"""Answers a prompt about images with a NEO, shown as it is generated; or answers all prompts of annotation files.

neo-megatron generate --model neo --image cat.png --prompt "What is the cat doing?"
neo-megatron generate --model neo --input prompts.jsonl --image-root images --output answers

A record of the input is an annotation record without its answer, or {"image": "cat.png", "prompt": "What is it?"}; the
turn after the last one of a user is answered, in answers.jsonl of the output. Rejected prompts are listed in
rejects.jsonl. The same command continues a run that was interrupted, also with another --batch-size or --workers.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from neo_megatron.atomic_files import json_line
from neo_megatron.cli.model_options import add_batches, add_model, check_arguments, quiet, task_of
from neo_megatron.cli.prompt_options import add_prompts
from neo_megatron.cli.schema_options import add_schemas, chosen, given_schema_flags
from neo_megatron.cli.source_options import input_sources
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.tags import IMAGE_TAG
from neo_megatron.errors import DataError, RejectedSample
from neo_megatron.inference.answer_run import ANSWERS, AnswerRun
from neo_megatron.inference.answering import MAX_NEW_TOKENS
from neo_megatron.inference.batches import answer_all, plan_of
from neo_megatron.inference.evaluation import all_rejects, answer_lines
from neo_megatron.inference.prompts import new_prompt
from neo_megatron.inference.questions import read_questions


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; options that contradict each other end with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_argument_group("one answer")
    one.add_argument(
        "--prompt",
        help=f"with {IMAGE_TAG} where an image belongs; without tags images come first; \\{IMAGE_TAG} is text",
    )
    one.add_argument(
        "--image", nargs="+", default=[], metavar="FILE", help="images, in the order of their tags; default: none"
    )
    many = parser.add_argument_group("many answers")
    many.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="annotation files, globs or directories, or addresses of these, of any kind that preprocess reads",
    )
    many.add_argument(
        "--image-root",
        default="",
        metavar="DIR",
        help="directory or address of the images; paths that leave it are rejected; default: paths are relative to the "
        "directory of --input, or absolute",
    )
    many.add_argument("--output", type=Path, metavar="DIR", help="directory to write; new, or of the same command")
    add_batches(many)
    add_schemas(parser)
    add_prompts(parser)
    add_model(parser, MAX_NEW_TOKENS)
    choice = parser.add_argument_group("sampling")
    choice.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        default=0.0,
        help="0 or more; 0: always the likeliest token; default: %(default)s",
    )
    choice.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        default=1.0,
        help="draw from the likeliest tokens that make up this probability, above 0, up to 1; default: %(default)s",
    )
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    if (arguments.prompt is None) == (arguments.input is None):
        parser.error("give either --prompt or --input")
    if bool(arguments.input) != bool(arguments.output):
        parser.error("--input and --output go together")
    if arguments.input and arguments.image:
        parser.error("--image goes with --prompt; records of --input have their own")
    if arguments.prompt is not None and arguments.image_root:
        parser.error("--image-root goes with --input; --image takes paths as they stand")
    if arguments.prompt is not None and (given := given_schema_flags(arguments, shared=True)):
        parser.error(f"{given[0]} goes with --input")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        parser.error("--temperature must be 0 or above, --top-p above 0 and at most 1")
    if arguments.top_p < 1 and not arguments.temperature:
        parser.error("--top-p needs a --temperature above 0: without one nothing is drawn")
    return arguments


def main() -> None:
    """Answers one prompt, or all prompts of files."""
    arguments = parse_arguments()
    quiet()
    generation: dict[str, Any] = {}
    if arguments.temperature:
        generation = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    if arguments.input:
        answer_file(arguments, generation)
    else:
        answer_one(arguments, generation)


def answer_one(arguments: argparse.Namespace, generation: dict[str, Any]) -> None:
    """Prints the answer to standard output, everything else to standard error."""
    task, _ = task_of(arguments, generation)
    try:
        prompt = new_prompt(arguments.prompt, arguments.image, task.settings, task.image_text)
    except RejectedSample as rejected:
        raise DataError(rejected.sentence) from rejected
    print(f"loading {arguments.model}", file=sys.stderr, flush=True)
    answerer = task.load()
    torch.manual_seed(arguments.seed)
    count, started = 0, time.monotonic()
    for piece in answerer.stream(prompt, task.max_new_tokens, **task.generation):
        print(piece.text, end="", flush=True)
        count += len(piece.tokens)
    print(flush=True)
    cut = ", cut at --max-new-tokens" if count >= arguments.max_new_tokens else ""
    seconds = time.monotonic() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s{cut}", file=sys.stderr)


def answer_file(arguments: argparse.Namespace, generation: dict[str, Any]) -> None:
    """Writes the answers to all prompts of `--input`, and lists what was left out."""
    sources = chosen(input_sources(arguments), to_answer=True)
    task, workers = task_of(arguments, generation)
    with AnswerRun(arguments.output, plan_of(task, sources, "next turn")) as run:
        listed = read_questions(sources, task.settings, "next turn")
        answer_all(listed.questions, task, run, arguments.batch_size, workers)
        lines = [line for line, _ in answer_lines(listed.questions, run.done)]
        rejects = all_rejects(listed, run.done)
        run.finish({ANSWERS: b"".join(map(json_line, lines)), REJECTS: b"".join(map(json_line, rejects))})
    for sentence in listed.noticed.sentences():
        print(sentence)
    print(f"{len(lines):,} answers in {arguments.output / ANSWERS}")
    if cut := sum(not line["finished"] for line in lines):
        print(f"{cut:,} answers were cut at --max-new-tokens")
    if rejects:
        print(f"{len(rejects):,} samples were rejected; they are listed in {arguments.output / REJECTS}")
