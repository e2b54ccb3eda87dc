"""Writes docs/commands.md, which has the --help of every command.

    python tools/write_commands.py [--output FILE]

The page is the same on every machine: lines have at most 100 columns, and a default that is the number of cores is
described instead of its value.
"""

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from neo_megatron.cli.commands import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
WIDTH = 100
_CORES = 9973  # stands for the number of cores while parsers are made; no flag has this default

HEAD = """\
# Commands

`neo-megatron COMMAND ...`, or `python -m neo_megatron COMMAND ...`. This page is what `--help` prints, written by
`python tools/write_commands.py`; do not edit it by hand. From a checkout, the scripts in `tools/` do the same.

Exit codes: 0 done; 1 an error, explained in the last line; 2 wrong usage; 130 interrupted by Ctrl-C. A command with
other codes lists them below.

| command | purpose |
|---|---|
"""
PRETRAIN = """\
NEO's own flags are listed here. Every flag of Megatron-LM is accepted or rejected as [Megatron's flags](flags.md) says;
`neo-megatron pretrain --help` prints those that can be used.
"""


class Found(Exception):
    """Carries a parser out of the function that would parse with it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def page() -> str:
    """The complete page."""
    rows = "".join(f"| [`{name}`](#{name}) | {command.summary} |\n" for name, command in COMMANDS.items())
    return HEAD + rows + "".join(f"\n## {name}\n{section(name)}" for name in COMMANDS)


def section(name: str) -> str:
    """The help of a command, and of its subcommands, as blocks of text."""
    parser = pretrain_parser() if name == "pretrain" else command_parser(name)
    blocks = [f"\n{PRETRAIN}"] if name == "pretrain" else []
    blocks += [f"\n```text\n{help_of(it)}```\n" for it in with_subparsers(parser)]
    return "".join(blocks)


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser that a command makes."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Found(parser)

    module = importlib.import_module(COMMANDS[name].module)
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(os, "sched_getaffinity", lambda _: range(_CORES)),
        mock.patch.object(sys, "argv", [f"neo-megatron {name}"]),
    ):
        try:
            module.parse_arguments()
        except Found as found:
            return found.parser
    raise AssertionError(f"{COMMANDS[name].module}.parse_arguments() parses nothing")


def pretrain_parser() -> argparse.ArgumentParser:
    """NEO's own flags, without those of Megatron."""
    from neo_megatron.arguments import add_neo_arguments
    from neo_megatron.run.help_text import USAGE

    return add_neo_arguments(argparse.ArgumentParser(prog="neo-megatron pretrain", usage=USAGE, add_help=False))


def with_subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, then those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def help_of(parser: argparse.ArgumentParser) -> str:
    """The output of --help, `WIDTH` columns wide."""
    for action in parser._actions:
        if action.default == _CORES:
            action.default = "the number of cores"
    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH)}):
        text = parser.format_help()
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n") + "\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="file to write (docs/commands.md)")
    output = parser.parse_args().output
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print while they are imported
        text = page()
    output.write_text(text)


if __name__ == "__main__":
    main()
