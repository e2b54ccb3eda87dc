"""Stops a run at a loss or gradient that is not a finite number, before it reaches the weights.

The rule, in every step of every start: the step is computed a second time, the run ends with a sentence that names the
packs, and what the last step left is saved. With `--rerun-mode disabled` it ends at once.

Megatron's rerun state machine finds such numbers and computes the step again. But it lets the first step of every start
pass, fails without `--save`, and saves a checkpoint from which no start on the same machine resumes (exit code 16),
because it wants to see the step computed on another GPU.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine
from megatron.training import get_args
from torch import Tensor

from neo_megatron.errors import ConfigError, DataError
from neo_megatron.megatron_compat import cpu_platform


def check_rerun_flags(args: Namespace) -> None:
    """Raises ConfigError for a mode of the rerun state machine that Megatron-Core 0.19.2 cannot start."""
    if args.rerun_mode == "report_stats":
        raise ConfigError(
            "--rerun-mode report_stats: Megatron-Core 0.19.2 knows it under two names and starts under neither: "
            "choose validate_results or disabled"
        )


@dataclass
class _MicroBatch:
    packs: Sequence[int]
    loss: Tensor | None = None  # on the last pipeline stage


@dataclass
class _Finding:
    """Findings of one rank about a step with a non-finite number.

    Args:
        rejected: what was rejected here; empty if another rank rejected something.
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
    _machine: Any = None
    _decide: Callable[[], tuple[bool, bool, int]] | None = None
    _validate: Callable[..., None] | None = None
    _describe: Callable[[Sequence[int]], str] = str
    _models: list[torch.nn.Module] = field(default_factory=list)
    _micro_batches: list[_MicroBatch] = field(default_factory=list)
    _complete: bool = False
    _steps: int = 0

    def watch(self, model: torch.nn.Module) -> None:
        """Called for each part of the model, after Megatron has made its rerun machine and before it loads."""
        self._models.append(model)
        if self._machine is not None:
            return
        self._machine = get_rerun_state_machine()
        self._decide, self._validate = cpu_platform.take_over_rerun_state_machine(
            self._machine, self._end_of_step, self._look_at
        )

    def note(self, packs: Sequence[int], describe: Callable[[Sequence[int]], str]) -> None:
        """Notes a micro-batch that the step reads, see `MicroBatches`."""
        if self._complete:
            self._micro_batches, self._complete = [], False
        self._micro_batches.append(_MicroBatch(packs))
        self._describe = describe

    def note_loss(self, loss: Tensor) -> None:
        """Notes the loss of the last micro-batch noted."""
        self._micro_batches[-1].loss = loss.detach().clone()

    def look_at_loss(self) -> None:
        """Checks the losses of a step; called once per computation of a step, after its last micro-batch."""
        self._complete = True
        losses = [micro_batch.loss for micro_batch in self._micro_batches if micro_batch.loss is not None]
        args = get_args()
        if not losses or self._machine is None:
            return
        total = torch.stack(losses).sum()
        if args.check_for_nan_in_loss_and_grad:
            self._machine.validate_result(total, _is_bad, "found NaN or Inf in the loss", tolerance=0.001)

    def _look_at(self, result: Any, rejection_func: Callable[[Any], bool], message: str, *rest, **keywords) -> None:
        """In place of the machine's `validate_result`."""
        args = get_args()
        self._machine.current_iteration = args.curr_iteration  # one iteration too many, also in its tracker file

        try:
            self._validate(result, rejection_func, message, *rest, **keywords)
        except RuntimeError as error:
            if self._machine.get_mode() != RerunMode.DISABLED:
                raise
            # The other ranks do not know of it and are ended.
            finding = self._finding(f"{message} ({float(result):g})")
            raise DataError(self._sentence(finding, reproducible=None, saved=False)) from error

    def _end_of_step(self) -> tuple[bool, bool, int]:
        """In place of the machine's `should_checkpoint_and_exit`; called on all ranks before the weights change."""
        reproducible, leave, code = self._decide()
        if not leave:
            self._steps += 1
            return False, False, 0
        findings: list[Any] = [None] * torch.distributed.get_world_size()
        call, result = self._machine.failed_validation_call, self._machine.initial_result
        rejected = f"{call.caller.message} ({float(result):g})" if self._machine.rerun_requested else ""
        torch.distributed.all_gather_object(findings, self._finding(rejected))
        worst = max(
            findings, key=lambda finding: (finding.parameter != "", finding.loss_is_bad, finding.rejected != "")
        )
        worst.rejected = next(filter(None, [worst.rejected, *(finding.rejected for finding in findings)]))
        args = get_args()
        saved = bool(reproducible and args.save and self._steps and args.curr_iteration % args.save_interval)
        self.sentence = self._sentence(worst, reproducible, saved)
        # Else the checkpoint would keep what the machine knows, and every start from it would end.
        self._machine.state = RerunState.NOT_RUNNING_YET
        return saved, True, code

    def _finding(self, rejected: str) -> _Finding:
        bad = [m for m in self._micro_batches if m.loss is not None and _is_bad(m.loss)]
        packs = sorted({number for micro_batch in bad or self._micro_batches for number in micro_batch.packs})
        place = f"node {os.uname().nodename}, device {torch.cuda.current_device()}"
        parameter = next(self._bad_parameters(), "")
        return _Finding(torch.distributed.get_rank(), place, rejected, self._describe(packs), bool(bad), parameter)

    def _bad_parameters(self) -> Iterator[str]:
        for model in self._models:
            yield from (name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all()))

    def _sentence(self, finding: _Finding, reproducible: bool | None, saved: bool) -> str:
        """The sentence on the worst finding; `reproducible` is `None` if the step was computed only once."""
        args = get_args()
        step = args.curr_iteration + 1
        rejected = "the loss is NaN or infinite" if finding.loss_is_bad else finding.rejected
        again = {True: ", and again when the step was computed a second time", None: ""}.get(
            reproducible, ", and not when the step was computed a second time"
        )
        what = f"step {step}: {rejected} on rank {finding.rank} ({finding.place}){again}"
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
        skipped = " ".join(map(str, sorted({*args.iterations_to_skip, step})))
        return (
            f"{what}; it comes from {finding.packs}; {untouched}: run the same command with --iterations-to-skip "
            f"{skipped} to leave out the packs of this step, or with a lower --lr"
        )


def _is_bad(value: Tensor) -> bool:
    return not bool(torch.isfinite(value).all())
