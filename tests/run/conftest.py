"""Command lines of trainings, parsed as a start parses them."""

import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable

import pytest

RUN = "--neo-model tiny --seq-length 192 --micro-batch-size 1 --global-batch-size 4"


@pytest.fixture
def parse(monkeypatch) -> Callable[[str], Namespace]:
    """Arguments that `pretrain_neo` parses from flags added to those of a small run, on one process."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    from neo_megatron.run import pretraining

    # Megatron parses its own source for the texts of --help, which takes a second.
    monkeypatch.setattr(ArgumentGroupFactory, "_get_field_docstrings", lambda factory, dataclass: defaultdict(str))
    monkeypatch.setattr("neo_megatron.run.training_arguments.set_global_variables", lambda args: None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")

    def parse_arguments(flags: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_neo", *RUN.split(), *flags.split()])
        return pretraining.parse_arguments()

    return parse_arguments
