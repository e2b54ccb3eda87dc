"""Evaluates every checkpoint of a run while it trains, on the same machine or on another one that sees the files.

neo-megatron follow run --output followed --tokenizer neo --input test.json --image-root images
neo-megatron follow run --output followed --tokenizer neo --registry registry.yaml --datasets docvqa chartqa%10

Each complete checkpoint is exported to Hugging Face form and evaluated as `neo-megatron evaluate` does. The scores go
to scores.jsonl, at the checkpoint's step into the TensorBoard, MLflow and Weights & Biases of the run, and to
page.html, which also shows answers that changed and attention maps. Exports other than the newest and the best are
deleted; the best have the highest mean exact match over data sets. The checkpoints of the run are only read.

It ends when the last step of the run is evaluated. It may be stopped at any time: the same command continues.
"""

import argparse
import shlex
import sys
from pathlib import Path

from neo_megatron.checkpoint.hub import tokenizer_directory
from neo_megatron.cli.model_options import add_answers, add_batches, check_arguments, quiet, task_of
from neo_megatron.cli.prompt_options import add_prompts
from neo_megatron.cli.source_options import add_sources, check_sources, chosen_sources
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.errors import ConfigError
from neo_megatron.follow.following import Evaluator, Follower
from neo_megatron.follow.lmms_eval import LmmsEval
from neo_megatron.follow.output import FollowOutput
from neo_megatron.follow.watched_run import WatchedRun
from neo_megatron.inference.batches import Task
from neo_megatron.paths import Wanted, check_path


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the --save directory of the run; it need not exist yet")
    add_sources(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for exports, evaluations, scores.jsonl and page.html, outside of RUN; new, or to be continued",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="HF_DIR", help="the tokenizer given to neo-megatron preprocess"
    )
    parser.add_argument(
        "--keep-best",
        type=int,
        metavar="N",
        default=1,
        help="exports that are kept in addition to the newest, those of the highest mean exact match over data sets; 0 "
        "or more; default: %(default)s",
    )
    parser.add_argument(
        "--poll",
        type=float,
        metavar="SECONDS",
        default=60,
        help="time between looks for a new checkpoint, above 0; default: %(default)s",
    )
    parser.add_argument(
        "--once", action="store_true", help="evaluate the checkpoints that are there, then end; default: wait for more"
    )
    parser.add_argument(
        "--lmms-eval-tasks",
        nargs="+",
        metavar="TASK",
        default=[],
        help="tasks of lmms-eval to run on each export, such as mme; default: none",
    )
    parser.add_argument(
        "--lmms-eval-command",
        metavar="COMMAND",
        help="the beginning of lmms-eval's command line, such as 'venv/bin/python -m lmms_eval --include_path tasks'; "
        "it may be installed elsewhere, with neo_megatron; default: this Python with -m lmms_eval",
    )
    add_prompts(parser)
    add_batches(parser)
    add_answers(parser.add_argument_group("model"), max_new_tokens=128)
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    check_sources(parser, arguments)
    if arguments.keep_best < 0:
        parser.error("--keep-best must be at least 0")
    command = arguments.lmms_eval_command
    if command is not None and not (arguments.lmms_eval_tasks and command.strip()):
        parser.error("--lmms-eval-command is a command, and goes with --lmms-eval-tasks")
    if not 0 < arguments.poll < float("inf"):
        parser.error("--poll must be above 0")
    return arguments


def check_places(run: str, output: Path, once: bool) -> None:
    """Checks the directories before anything is written.

    Raises:
        WrongPath: RUN holds something else.
        ConfigError: the output is in the directory of the run; there is no run.
    """
    check_path(run, Wanted.FOLLOWED, "RUN")
    if once and not Path(run).exists():
        raise ConfigError(f"RUN {run} does not exist: give the --save directory of the run")
    if output.resolve().is_relative_to(Path(run).resolve()):
        raise ConfigError(f"--output {output} is in the directory of the run, which is only read: choose another")


def lmms_eval_of(arguments: argparse.Namespace) -> LmmsEval | None:
    """The tasks of lmms-eval, if there are any."""
    if not arguments.lmms_eval_tasks:
        return None
    command = shlex.split(arguments.lmms_eval_command or "") or [sys.executable, "-m", "lmms_eval"]
    return LmmsEval(command, arguments.lmms_eval_tasks, arguments.batch_size)


def main() -> None:
    """Follows the run until it is finished."""
    arguments = parse_arguments()
    check_places(arguments.run, arguments.output, arguments.once)
    quiet()
    tokenizer = load_tokenizer(tokenizer_directory(arguments.tokenizer))
    sources = chosen_sources(arguments)

    def task_of_export(export: Path) -> tuple[Task, int]:
        return task_of(argparse.Namespace(**vars(arguments), model=str(export), allow_pickle=False), {})

    with FollowOutput(arguments.output) as output:
        lmms_eval = lmms_eval_of(arguments)
        evaluator = Evaluator(tokenizer, sources, task_of_export, arguments.batch_size, lmms_eval)
        Follower(WatchedRun(arguments.run), output, evaluator, arguments.keep_best).follow(
            arguments.once, arguments.poll
        )
