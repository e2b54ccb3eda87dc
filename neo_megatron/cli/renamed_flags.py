"""Flags under their old names, which keep working with a note on stderr."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from neo_megatron.command_line import program_name


class _Renamed(argparse.Action):
    """Stores the value under the new flag's name, with a note on stderr."""

    def __init__(self, option_strings: list[str], dest: str, new: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self._new = new

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(f"{program_name()}: {option_string} is deprecated; use {self._new}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_old_name(parser: argparse._ActionsContainer, old: str, new: str, kind: Callable[[str], Any]) -> None:
    """Accepts ``old`` for ``new``, a flag with one value of the type ``kind``; `--help` does not list the old one."""
    parser.add_argument(
        old,
        dest=new.removeprefix("--").replace("-", "_"),
        new=new,
        type=kind,
        action=_Renamed,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
