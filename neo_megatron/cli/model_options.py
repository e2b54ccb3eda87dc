"""Options that `generate` and `evaluate` share, and the task that they describe."""

import argparse
import sys
from typing import Any

from transformers import logging

from neo_megatron.checkpoint.hub import model_directory
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.inference.batches import Task, default_workers


def add_model(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds the options of the checkpoint, of image sizes and of the length of answers."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="HF_DIR", help="a NEO checkpoint, or the hub id of one")
    model.add_argument(
        "--allow-pickle", action="store_true", help="take pickled weights where there are no safetensors"
    )
    model.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: as it is stored")
    model.add_argument("--min-pixels", type=int, help="of a resized image (the checkpoint's)")
    model.add_argument("--max-pixels", type=int, help="of a resized image (the checkpoint's)")
    model.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="of an answer (%(default)s)")


def add_batches(parser: argparse._ActionsContainer) -> None:
    """Adds the options of answering many questions."""
    parser.add_argument(
        "--video-fps", type=float, default=PreprocessConfig.video_fps, help="frames a second (%(default)s)"
    )
    parser.add_argument(
        "--max-frames", type=int, default=PreprocessConfig.max_frames, help="of one video (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered together (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes, each with a model (one for each GPU, or for each core)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a sentence where options contradict each other."""
    for name in ("batch_size", "workers", "max_new_tokens", "min_pixels", "max_pixels"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")


def quiet() -> None:
    """Silences transformers, whose messages and bars while it loads would hide what matters."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def task_of(arguments: argparse.Namespace, generation: dict[str, Any]) -> tuple[Task, int]:
    """The task of each worker, and the number of workers. What had to be put right about the checkpoint is said."""
    directory = model_directory(arguments.model, arguments.allow_pickle)
    neo = open_neo(directory, arguments.allow_pickle)
    for sentence in neo.said:
        print(f"{directory}/config.json: {sentence}", file=sys.stderr)
    settings = PreprocessConfig(
        min_pixels=arguments.min_pixels or neo.sizes.min_pixels,
        max_pixels=arguments.max_pixels or neo.sizes.max_pixels,
        image_store="patches",
        seed=arguments.seed,
        video_fps=arguments.video_fps,
        max_frames=arguments.max_frames,
    )
    task = Task(directory, arguments.dtype, settings, arguments.max_new_tokens, generation, arguments.allow_pickle)
    return task, arguments.workers or default_workers(directory)
