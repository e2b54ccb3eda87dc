"""The types of the table of Megatron's flags in `flag_table.py`."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """Effect of a flag in a training of NEO."""

    WORKS = "works"
    WORKS_ON_GPU = "passed on"
    """Passed to Megatron unchanged; it acts on GPUs only, where no test of this repository has run it."""
    NO_EFFECT = "no effect"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Verdict:
    """One status for several flags.

    Args:
        why: of a flag that works the test that shows it; of a rejected one the reason and the remedy.
    """

    status: Status
    why: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class OnlyValues:
    """A flag that works with some of the values that Megatron takes.

    Args:
        values: as they are written on the command line.
        remedy: what to do instead of giving another value.
    """

    flag: str
    values: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class OnlyWith:
    """Flags that Megatron reads only where another one is given, and would ignore without it.

    Args:
        needed: the other flag, as it is to be written.
        where: whether it is given, from the arguments as parsed.
        flags: the flags that need it.
    """

    needed: str
    where: Callable[[Namespace], object]
    flags: tuple[str, ...]


def rejected(why: str, flags: str) -> Verdict:
    """A verdict of `Status.REJECTED` on flags separated by spaces."""
    return Verdict(Status.REJECTED, why, tuple(flags.split()))
