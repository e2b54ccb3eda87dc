"""Packs of several lengths in one run: a mixture whose phases have packs of another length, such as 16k, then 36k.

Megatron has one length, `args.seq_length`, and passes it to the pipeline's schedule in every step, which sizes what the
stages send each other. Here that is the length of the step's packs while the step runs, and the longest of the run
everywhere else: in plans, evaluations and checkpoints. Nothing else in a run depends on it.
"""

import copy
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.training import get_args

from neo_megatron.data.packs.mixture_schedule import longest_packs, open_streams, pack_lengths
from neo_megatron.errors import ConfigError
from neo_megatron.model.compiled import GRAPHS
from neo_megatron.run.console import say
from neo_megatron.validation.parallelism import check_layout


def take_lengths(args: Namespace) -> None:
    """Sets ``args.pack_lengths``, see `pack_lengths`, and ``args.seq_length`` to the longest unless given.

    Raises:
        ConfigError: a flag takes all packs for equally long, and they are not.
    """
    paths = args.train_data_path or args.valid_data_path or args.test_data_path
    lengths = pack_lengths(*open_streams(paths[0])) if paths else ()
    if args.seq_length is None and lengths:
        args.seq_length = longest_packs(lengths)[1]
    # Plain lists, because they are saved with the arguments of a checkpoint.
    args.pack_lengths = [[start, length] for start, length in lengths]
    if len(lengths) < 2:
        return
    # Every length has graphs of its own, and beyond the limit PyTorch continues uncompiled.
    torch._dynamo.config.recompile_limit = GRAPHS * len({length for _, length in lengths})
    for flag, why in {
        "--step-batch-size-schedule": "counts tokens by one length of packs",
        "--log-progress": "counts tokens by one length of packs",
        "--tp-comm-overlap": "has buffers for one length of packs",
    }.items():
        if getattr(args, flag.removeprefix("--").replace("-", "_")):
            raise ConfigError(f"{flag} {why}, and --mixture {paths[0]} has several: leave it out")


def check_layouts_of_lengths(args: Namespace) -> None:
    """`check_layout` for every length of packs. Raises ConfigError with the first reason why one cannot train."""
    check_layout(args)
    for length in sorted({length for _, length in args.pack_lengths} - {args.seq_length}):
        of_length = copy.copy(args)
        of_length.seq_length = length
        check_layout(of_length)


def check_borders(args: Namespace, consumed: int, packs: int) -> None:
    """Raises ConfigError if packs of another length would begin within a step.

    Args:
        consumed: packs that the run has read.
        packs: that it has read when it ends.
    """
    size = args.global_batch_size
    for (start, length), (_, before) in zip(args.pack_lengths[1:], args.pack_lengths, strict=False):
        within = (start - consumed) % size
        if consumed < start < packs and within:
            raise ConfigError(
                f"--mixture {args.mixture}: pack {start} begins packs of {length} tokens after those of {before}, in "
                f"the middle of a step of {size} packs: begin them at pack {start - within + size}"
            )


def length_at(lengths: Sequence[Sequence[int]], pack: int) -> int:
    """Tokens of a pack of the run."""
    return [length for start, length in lengths if start <= pack][-1]


def longest_ahead(lengths: Sequence[Sequence[int]], consumed: int, packs: int) -> int:
    """The first of the longest packs that a run reads from pack number `consumed` on, until it has read `packs`."""
    starts = [consumed, *(start for start, _ in lengths if consumed < start < packs)]
    return max(starts, key=lambda start: length_at(lengths, start))


class StepLengths:
    """Gives each step the length of its packs."""

    def __init__(self) -> None:
        self._said: int | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """To be entered around each training step, on all ranks."""
        args = get_args()
        longest = args.seq_length
        if len(args.pack_lengths) > 1:
            args.seq_length = length_at(args.pack_lengths, args.consumed_train_samples)
            if args.seq_length != self._said and args.rank == 0:
                say(f"packs of {args.seq_length:,} tokens from pack {args.consumed_train_samples:,} on")
            self._said = args.seq_length
        try:
            yield
        finally:
            args.seq_length = longest
