"""Entry points of all commands. Imports only `sys`, so that Ctrl-C while modules load is one sentence too."""

import sys


def main() -> None:
    """The entry point `neo-megatron` of the installed package."""
    try:
        from neo_megatron.cli import main as commands
    except KeyboardInterrupt:
        _end_interrupted()
    commands.main()


def run_command(name: str) -> None:
    """Runs one command on ``sys.argv``, as the scripts of `tools/` do."""
    try:
        from neo_megatron.cli import main as commands
    except KeyboardInterrupt:
        _end_interrupted()
    commands.run_command(name)


def _end_interrupted() -> None:
    program = sys.argv[0].rpartition("/")[2].removesuffix(".py")
    print(f"{program}: interrupted", file=sys.stderr)
    sys.exit(130)
