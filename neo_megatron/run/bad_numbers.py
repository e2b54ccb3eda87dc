"""Stops a run at a loss or gradient that is not a finite number, before it reaches the weights.

The rule, in every step of every start: the step is computed a second time, the run ends with a sentence that names the
packs, and what the last step left is saved. With `--rerun-mode disabled` it ends at once.

One number of a step is looked at: the norm of the reduced gradients, which Megatron computes anyway and which is not
finite where any gradient or loss of any rank is not (see `WeightedLoss` for losses). Its own checks wait for the GPU
twice for each bucket of gradients within the backward; they are on in the second computation alone, to find the rank.
Its rerun state machine stays off: it keeps all micro-batches of a step, all ranks wait for one another to ask whether
one of them wants a second computation, it lets the first step of every start pass, and it saves a checkpoint from which
no start on the same machine resumes (exit code 16), because it wants to see the step computed on another GPU.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args, get_timers
from torch import Tensor

from neo_megatron.errors import ConfigError, DataError
from neo_megatron.megatron_compat import hooks, steps
from neo_megatron.megatron_compat.steps import local_part


def check_rerun_flags(args: Namespace) -> None:
    """Raises ConfigError for a mode of Megatron's rerun state machine that NEO does not have."""
    if args.rerun_mode == "report_stats":
        raise ConfigError(
            "--rerun-mode report_stats: Megatron-Core 0.19.2 knows it under two names and starts under neither: "
            "choose validate_results or disabled"
        )


class _StepEnds(Exception):
    """The weights must not change: the norm is not finite, or the step was only computed a second time."""

    def __init__(self, norm: float) -> None:
        self.norm = norm


_NORM = "the norm of the gradients is NaN or infinite"


@dataclass
class _MicroBatch:
    """One that was read for a part of the model.

    Args:
        chunk: which part, of those that this rank has of the model.
        again: reads the micro-batch again.
        loss: on the last pipeline stage.
    """

    packs: Sequence[int]
    chunk: int
    again: Callable[[], dict[str, Any]]
    loss: Tensor | None = None


@dataclass
class _Finding:
    """Findings of one rank about a step with a non-finite number.

    Args:
        rejected: what was rejected here in the second computation; empty if nothing was.
        packs: those whose loss is bad, or all of the step that this rank read.
        parameter: one whose own value is not finite.
    """

    rank: int
    place: str
    rejected: str
    packs: str
    loss_is_bad: bool
    parameter: str


@dataclass
class BadNumbers:
    """Watches the numbers of a run.

    Attributes:
        sentence: why the run ends; empty while it continues.
    """

    sentence: str = ""
    _validate: Callable[..., None] | None = None
    _describe: Callable[[Sequence[int]], str] = str
    _models: list[torch.nn.Module] = field(default_factory=list)
    _micro_batches: list[_MicroBatch] = field(default_factory=list)
    _complete: bool = False
    _again: bool = False
    _rejected: str = ""
    _steps: int = 0

    def watch(self, model: torch.nn.Module) -> None:
        """Called for each part of the model, after Megatron has made its rerun machine and before it loads."""
        self._models.append(model)
        if self._validate is None:
            self._validate = hooks.turn_off_rerun_state_machine(get_rerun_state_machine(), self._look_at_bucket)

    def note(self, packs: dict[str, Any], chunk: int) -> None:
        """Notes a micro-batch of `MicroBatches` that the step reads for one of this rank's parts of the model."""
        if self._complete:
            self._micro_batches, self._complete = [], False
        self._micro_batches.append(_MicroBatch(packs["packs"], chunk, packs["again"]))
        self._describe = packs["describe"]

    def note_loss(self, loss: Tensor) -> None:
        """Notes the loss of the last micro-batch noted."""
        self._micro_batches[-1].loss = loss.detach().clone()

    def end_of_computation(self) -> None:
        """Called once per computation of a step, after its last micro-batch."""
        self._complete = True

    def look_at_norm(self, norm: float) -> None:
        """Called on all ranks with the norm of the reduced gradients, before the weights change.

        Raises:
            _StepEnds: to `step`.
        """
        if self._again or (get_args().check_for_nan_in_loss_and_grad and not math.isfinite(norm)):
            raise _StepEnds(norm)

    def step(self, compute: Callable[[Any], Any], data_iterator: Any, model: list[torch.nn.Module]) -> Any:
        """In place of Megatron's `train_step`; see `steps.patch_steps`."""
        _check_buckets(model, False)
        try:
            result = compute(data_iterator)
        except _StepEnds:
            get_timers()("optimizer", log_level=1).stop()  # or the next computation could not start it
        else:
            self._steps += 1
            return result
        reproducible = None
        if get_args().rerun_mode != "disabled":
            again = [self._read_again(chunk) for chunk in range(len(model))]
            reproducible = self._compute_again(compute, again if isinstance(data_iterator, list) else again[0], model)
        return self._end_run(reproducible)

    def _read_again(self, chunk: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of the step for a part of the model."""
        return (micro_batch.again() for micro_batch in self._micro_batches if micro_batch.chunk == chunk)

    def _compute_again(self, compute: Callable[[Any], Any], data_iterator: Any, model: list[torch.nn.Module]) -> bool:
        """Whether the norm is not finite again."""
        _check_buckets(model, True)
        self._again = True
        try:
            compute(data_iterator)
        except _StepEnds as end:
            return not math.isfinite(end.norm)
        raise AssertionError("the weights must not change in a second computation")

    def _end_run(self, reproducible: bool | None) -> Any:
        """Sets the sentence; `reproducible` is `None` if the step was computed only once."""
        findings: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(findings, self._finding())
        worst = max(
            findings, key=lambda finding: (finding.parameter != "", finding.loss_is_bad, finding.rejected != "")
        )
        args = get_args()
        saved = bool(reproducible and args.save and self._steps and args.curr_iteration % args.save_interval)
        sentence = self._sentence(worst, reproducible, saved)
        if reproducible is None:
            raise DataError(sentence)
        self.sentence = sentence
        return steps.end_of_run(saved)

    def _look_at_bucket(
        self, result: Any, rejection_func: Callable[[Any], bool], message: str, fatal: bool = True, **keywords: Any
    ) -> None:
        """In place of the rerun machine's `validate_result`, which Megatron calls for its buckets of gradients."""
        if not fatal:
            self._validate(result, rejection_func, message, fatal=fatal, **keywords)
        elif not self._rejected and rejection_func(result):
            self._rejected = f"{message} ({float(result):g})"

    def _finding(self) -> _Finding:
        bad = [m for m in self._micro_batches if m.loss is not None and not bool(torch.isfinite(m.loss).all())]
        packs = sorted({number for micro_batch in bad or self._micro_batches for number in micro_batch.packs})
        place = f"node {os.uname().nodename}, device {torch.cuda.current_device()!s}"
        parameter = next(self._bad_parameters(), "")
        return _Finding(
            torch.distributed.get_rank(), place, self._rejected, self._describe(packs), bool(bad), parameter
        )

    def _bad_parameters(self) -> Iterator[str]:
        for model in self._models:
            yield from (name for name, p in model.named_parameters() if not bool(torch.isfinite(local_part(p)).all()))

    def _sentence(self, finding: _Finding, reproducible: bool | None, saved: bool) -> str:
        args = get_args()
        step = args.curr_iteration + 1
        rejected = "the loss is NaN or infinite" if finding.loss_is_bad else finding.rejected
        rejected = f"{rejected} on rank {finding.rank} ({finding.place})" if rejected else _NORM
        again = {True: ", and again when the step was computed a second time", None: ""}.get(
            reproducible, ", and not when the step was computed a second time"
        )
        what = f"step {step}: {rejected}{again}"
        if finding.parameter:
            return (
                f"{what}; the parameter {finding.parameter} itself is not finite, so the checkpoint that this run "
                "started from, or an earlier step, is spoilt: start from an earlier checkpoint with --ckpt-step"
            )
        untouched = f"the weights are untouched{f' and were saved in {args.save}' if saved else ''}"
        if reproducible is False:
            return (
                f"{what}; {untouched}: the machine is suspect and not the data: run the same command again, if it "
                "happens again then on another machine"
            )
        source = "one of the packs of the step" if rejected == _NORM else finding.packs
        skipped = " ".join(map(str, sorted({*args.iterations_to_skip, step})))
        return (
            f"{what}; it comes from {source}; {untouched}: run the same command with --iterations-to-skip "
            f"{skipped} to leave out the packs of this step, or with a lower --lr"
        )


def _check_buckets(model: list[torch.nn.Module], check: bool) -> None:
    """Whether Megatron looks at each bucket of gradients."""
    for chunk in model:
        chunk.ddp_config.check_for_nan_in_grad = check
