"""Options of the chat layout: how turns become tokens, and how several images share the limit of pixels."""

import argparse
from typing import Any, get_args

from neo_megatron.data.config import TEXT_TOKENS, ChatLayout, PreprocessConfig


def add_layout(parser: argparse._ActionsContainer) -> None:
    """Adds --chat-layout."""
    parser.add_argument(
        "--chat-layout",
        choices=get_args(ChatLayout),
        default=PreprocessConfig.chat_layout,
        help="neo1_0 is that of NEO 1.0 and NEO-ov, and of the published chat() of all of them; u1 is that of "
        "SenseNova-U1's training: an empty <think> block in front of plain answers, and further roles (%(default)s)",
    )


def add_chat(parser: argparse._ActionsContainer) -> None:
    """Adds --chat-layout and --sample-tokens."""
    add_layout(parser)
    parser.add_argument(
        "--sample-tokens",
        type=int,
        metavar="TOKENS",
        help="of layout u1: the longest sample, which is the length of the packs; several images of a sample share "
        f"these tokens less {TEXT_TOKENS}; above {TEXT_TOKENS} ({PreprocessConfig.sample_tokens})",
    )


def chat_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `PreprocessConfig` that these options set."""
    given = {} if arguments.sample_tokens is None else {"sample_tokens": arguments.sample_tokens}
    return {"chat_layout": arguments.chat_layout, **given}


def check_chat(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a usage error if these options contradict each other."""
    if arguments.sample_tokens is not None and arguments.chat_layout != "u1":
        parser.error("--sample-tokens goes with --chat-layout u1; images of neo1_0 share twice --max-pixels")
