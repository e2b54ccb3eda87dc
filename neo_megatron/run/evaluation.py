"""Evaluation on validation and test packs: which packs an evaluation reads, and flags that only concern evaluation.

Megatron counts in advance how many packs all evaluations of a run will read, and fails when a start with other flags
reads more. Here evaluation packs are read in rounds: after the last pack the first one follows, in the same order,
so that no number of evaluations ends a run and losses stay comparable.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_args, get_timers

from neo_megatron.data.dataset import DrawnPack, PackDataset
from neo_megatron.errors import ConfigError


def check_evaluation_flags(args: Namespace) -> None:
    """Checks the flags of evaluation and sets arguments that depend on them. Called before Megatron's own checks.

    Raises:
        ConfigError: with the flag and a remedy.
    """
    has_packs = bool(args.valid_data_path or args.test_data_path)
    if args.eval_interval is None or args.eval_interval < 1:
        raise ConfigError(
            f"--eval-interval {args.eval_interval}: give a number of steps from 1 on; one larger than --train-iters "
            "evaluates after the last step only, and --eval-iters 0 never"
        )
    if args.eval_iters is None:
        args.eval_iters = 0
    if args.eval_iters < 0:
        raise ConfigError(f"--eval-iters {args.eval_iters}: give 1 or more, or 0 to never evaluate")
    if args.full_validation and not args.valid_data_path:
        raise ConfigError("--full-validation needs --valid-data-path, the packs that it evaluates in full")
    if args.skip_train:
        if not has_packs:
            raise ConfigError("--skip-train only evaluates: it needs --valid-data-path or --test-data-path")
        if not args.eval_iters and not args.full_validation:
            raise ConfigError("--skip-train with --eval-iters 0 does nothing: give 1 or more, or --full-validation")
        if not args.load and not args.pretrained_checkpoint:
            raise ConfigError("--skip-train evaluates a checkpoint: it needs --load or --pretrained-checkpoint")
        args.save = None  # nothing is saved, and the directory must stay unchanged
        if args.train_iters is None and args.train_samples is None:
            args.train_iters = 1  # Megatron needs a value, and trains no step
    if not has_packs:
        args.eval_iters = 0  # otherwise Megatron evaluates zero packs after the last step
    # Megatron's own full validation fails on one validation set, and weighs packs by micro-batch.
    args.evaluates_all_packs, args.full_validation = args.full_validation, False
    args.evaluation_views, args.evaluation_cut_short = 1, False  # see `evaluate_split`
    if args.evaluates_all_packs:
        args.eval_iters = max(args.eval_iters, 1)


@dataclass(frozen=True)
class EvaluationRound:
    """The order in which evaluations read the packs of a split.

    Args:
        packs: of the split.
        batch: packs of an evaluation iteration, `--eval-global-batch-size`.
        in_full: whether each evaluation reads every pack once.
        iterations: `--eval-iters`, used unless `in_full`.
    """

    packs: int
    batch: int
    in_full: bool
    iterations: int

    @property
    def iterations_of_an_evaluation(self) -> int:
        return -(-self.packs // self.batch) if self.in_full else self.iterations

    def sampler(self, start: int, micro_batch_size: int, rank: int, ranks: int) -> "EvaluationSampler":
        """The packs of a data-parallel rank, see `EvaluationSampler`.

        Args:
            start: packs that earlier evaluations have read; ignored if `in_full`, which begins with the first pack.
        """
        length = self.iterations_of_an_evaluation * self.batch if self.in_full else self.packs
        return EvaluationSampler(0 if self.in_full else start, length, micro_batch_size, rank, ranks)


@dataclass(frozen=True)
class EvaluationSampler:
    """Numbers of the packs of each micro-batch of a rank, without end: after number `length - 1` comes 0.

    Dealt to ranks as Megatron's sampler deals those of training.
    """

    start: int
    length: int
    micro_batch_size: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro_batch_size
        while True:
            yield [number % self.length for number in range(first, first + self.micro_batch_size)]
            first += self.micro_batch_size * self.ranks


class EvaluationPacks(torch.utils.data.Dataset):
    """Packs of a split, followed by packs of loss weight 0 that fill the last batch of a round."""

    def __init__(self, packs: PackDataset) -> None:
        self.packs, self.data_sets, self.has_images = packs, packs.data_sets, packs.has_images

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < len(self.packs):
            return self.packs[number]
        item = self.packs[number % len(self.packs)]
        return {**item, "target_weight": torch.zeros_like(item["target_weight"]), "samples": 0, "broken": []}

    def pack(self, number: int) -> DrawnPack:
        """See `PackDataset.pack`."""
        return self.packs.pack(number % len(self.packs))


def evaluate_split(
    evaluate: Callable[[], None], data_iterator: RerunDataIterator | list[RerunDataIterator] | None
) -> None:
    """Runs an evaluation of a split; does nothing for a split without packs.

    Args:
        evaluate: Megatron's evaluation of this split; it knows one number of iterations for all splits.
        data_iterator: one, or one for each virtual pipeline stage.

    Sets ``args.evaluation_views``, how often each pack is read, and ``args.evaluation_cut_short``.
    """
    first = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    if first is None:
        return
    args = get_args()
    args.evaluation_views = views = first.iterable.views
    before, args.eval_iters = args.eval_iters, first.iterable.iterations * views
    consumed = args.consumed_valid_samples
    try:
        evaluate()
    finally:
        args.eval_iters = before
    # Megatron counts the packs of an iteration in each view.
    args.consumed_valid_samples = consumed + (args.consumed_valid_samples - consumed) // views
    timer = get_timers()("evaluate", log_level=0)
    args.evaluation_cut_short = timer._started
    if timer._started:  # --exit-duration-in-mins has ended the evaluation; the next one would fail on a running timer
        timer.stop()
