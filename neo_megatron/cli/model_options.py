"""Options that `generate` and `evaluate` share, and the task that they describe."""

import argparse
import sys
from typing import Any

from transformers import logging

from neo_megatron.checkpoint.hub import model_directory
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.cli.chat_options import chat_settings, check_chat
from neo_megatron.cli.video_options import add_video, video_settings
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.inference.batches import Task, default_workers


def add_model(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds the options of the checkpoint, of image sizes and of the length of answers."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="HF_DIR", help="a NEO in Hugging Face form, or its hub id")
    model.add_argument("--allow-pickle", action="store_true", help="read pickled weights if there are no safetensors")
    add_answers(model, max_new_tokens)


def add_answers(model: argparse._ActionsContainer, max_new_tokens: int) -> None:
    """Adds the options of image sizes and of the length of answers."""
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="of weights and computation; auto, the default: as stored",
    )
    model.add_argument(
        "--min-pixels", type=int, metavar="N", help="fewest pixels of a resized image; default: the checkpoint's"
    )
    model.add_argument(
        "--max-pixels", type=int, metavar="N", help="most pixels of a resized image; default: the checkpoint's"
    )
    model.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=max_new_tokens,
        help="most tokens of an answer; default: %(default)s",
    )


def add_batches(parser: argparse._ActionsContainer) -> None:
    """Adds the options of answering many questions."""
    parser.add_argument(
        "--video-fps",
        type=float,
        metavar="X",
        default=PreprocessConfig.video_fps,
        help="frames taken per second of a video; default: %(default)s",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        metavar="N",
        default=PreprocessConfig.max_frames,
        help="most frames of a video; default: %(default)s",
    )
    add_video(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=32, help="questions answered together; default: %(default)s"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, each with a model of its own; default: one per GPU, or one per core without GPUs",
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of random draws; default: %(default)s")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a message if an option is out of range, or two contradict each other."""
    check_chat(parser, arguments)
    for name in ("batch_size", "workers", "max_new_tokens", "min_pixels", "max_pixels"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")


def quiet() -> None:
    """Silences transformers, whose messages and bars while it loads would hide what matters."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def task_of(arguments: argparse.Namespace, generation: dict[str, Any]) -> tuple[Task, int]:
    """The task of each worker, and the number of workers; prints corrections of the checkpoint's config."""
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
        **video_settings(arguments),
        **chat_settings(arguments),
    )
    task = Task(
        directory,
        arguments.dtype,
        settings,
        arguments.max_new_tokens,
        generation,
        arguments.allow_pickle,
        arguments.system,
        arguments.image_text,
    )
    return task, arguments.workers or default_workers(directory)
