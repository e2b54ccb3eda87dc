"""Options of the form in which a model is asked: chat layout, system turn, and the places of images."""

import argparse
from typing import get_args

from neo_megatron.cli.chat_options import add_chat
from neo_megatron.inference.prompt_forms import ImageText


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Adds --chat-layout, --sample-tokens, --system and --image-text."""
    group = parser.add_argument_group("form of the prompt (docs/evaluation.md)")
    add_chat(group)
    add_system(group)
    group.add_argument(
        "--image-text",
        choices=get_args(ImageText),
        default="written",
        help="where the images of a user's turn stand: written is where their tags are; in-order is NEO-ov's, numbered "
        "that of NEO 1.0 and of NEO-ov's spatial class, referenced that of MUIRBench (%(default)s)",
    )


def add_system(parser: argparse._ActionsContainer) -> None:
    """Adds --system."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        default="",
        help="a system turn in front of conversations that have none; NEO-ov is asked with 'Reason step by step.'; "
        "default: none",
    )
