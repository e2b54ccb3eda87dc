"""`neo-megatron COMMAND ...`: runs a command; `neo-megatron --help` lists them."""

import difflib
import importlib
import runpy
import sys

from neo_megatron import __version__, command_line
from neo_megatron.cli.commands import COMMANDS

WRONG_USAGE = 2  # exit code, as that of argparse


def main() -> None:
    """Runs the command that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        sys.exit(0 if words else WRONG_USAGE)
    if words[0] == "--version":
        print(f"neo-megatron {__version__}")
        return
    if words[0] not in COMMANDS:
        similar = difflib.get_close_matches(words[0], COMMANDS, 1)
        remedy = f"did you mean {similar[0]}" if similar else f"give one of {', '.join(COMMANDS)}"
        print(f"neo-megatron: there is no command {words[0]!r}: {remedy}", file=sys.stderr)
        sys.exit(WRONG_USAGE)
    sys.argv = [f"neo-megatron {words[0]}", *words[1:]]
    run_command(words[0])


def run_command(name: str) -> None:
    """Runs a command on ``sys.argv``; an error that the user can remedy ends the process with one sentence."""
    command = COMMANDS[name]
    if command.starts_itself:
        # As `python -m` does, because the process of asynchronous saves imports the main module again.
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
        return
    program = command_line.program_name()
    command_line.begin(program, command.paths)  # before the import below, which takes seconds
    module = importlib.import_module(command.module)
    command_line.run(program, module.main, interrupted=command.interrupted)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: neo-megatron [--help] [--version] COMMAND ...",
            "",
            "Pretrains NEO, native vision-language models, on Megatron-Core.",
            "",
            *lines,
            "",
            "neo-megatron COMMAND --help shows the flags of a command with units, defaults and ranges.",
            "Exit codes: 0 done; 1 an error, told in the last line; 2 wrong usage; 130 interrupted by Ctrl-C.",
        ]
    )
