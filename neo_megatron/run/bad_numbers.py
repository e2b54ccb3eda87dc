"""Stops a run at a bad loss or gradient, or skips the step, before it reaches the weights.

Bad is a number that is not finite, and with `--loss-jump` a loss that jumps (see `bad_loss_rule`). In every step of
every start: the step is computed a second time, a sentence names the packs, and the run ends, once what the last step
left is saved; or with `--on-bad-loss skip` it goes on. With `--rerun-mode disabled` nothing is computed twice.

One number of a step is looked at: the norm of the reduced gradients, which Megatron computes anyway and which is not
finite where any gradient or loss of any rank is not (see `WeightedLoss` for losses). Its own checks wait for the GPU
twice for each bucket of gradients within the backward; they are on in the second computation alone, to find the rank.
The loss itself is read, and summed over all ranks, only with `--loss-jump`.
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
from neo_megatron.run import bad_loss_rule
from neo_megatron.run.console import say


def check_rerun_flags(args: Namespace) -> None:
    """Raises ConfigError for a mode of Megatron's rerun state machine that NEO does not have."""
    if args.rerun_mode == "report_stats":
        raise ConfigError(
            "--rerun-mode report_stats: Megatron-Core 0.19.2 knows it under two names and starts under neither: "
            "choose validate_results or disabled"
        )


class _StepEnds(Exception):
    """The weights must not change: the step is bad, or was only computed a second time.

    Args:
        bad: why; empty if it is not.
    """

    def __init__(self, bad: str) -> None:
        self.bad = bad


_NORM = "the norm of the gradients is NaN or infinite"


@dataclass
class _MicroBatch:
    """One that was read for a part of the model.

    Args:
        chunk: which part, of those that this rank has of the model.
        again: reads the micro-batch again.
        loss: the weighted sum, on the last pipeline stage, and the sum of weights.
    """

    packs: Sequence[int]
    chunk: int
    again: Callable[[], dict[str, Any]]
    loss: Tensor | None = None
    weight: Tensor | None = None


@dataclass
class _Finding:
    """Findings of one rank about a bad step.

    Args:
        rejected: what was rejected here in the second computation; empty if nothing was.
        packs: those whose loss is not finite, or highest, or all of the step that this rank read.
        loss_is_bad: that of some packs is not finite.
        highest: if the loss jumps, the highest one of a micro-batch.
        parameter: one whose own value is not finite.
    """

    rank: int
    place: str
    rejected: str
    packs: str
    loss_is_bad: bool
    highest: float
    parameter: str


@dataclass
class BadNumbers:
    """Watches the numbers of a run.

    Attributes:
        sentence: why the run ends; empty while it continues.
        again: whether a step is computed a second time.
    """

    sentence: str = ""
    _validate: Callable[..., None] | None = None
    _describe: Callable[[Sequence[int]], str] = str
    _models: list[torch.nn.Module] = field(default_factory=list)
    _micro_batches: list[_MicroBatch] = field(default_factory=list)
    _complete: bool = False
    again: bool = False
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

    def note_loss(self, loss: Tensor, weight: Tensor) -> None:
        """Notes the weighted loss of the last micro-batch noted, and the sum of its weights."""
        self._micro_batches[-1].loss, self._micro_batches[-1].weight = loss.detach().clone(), weight

    def end_of_computation(self) -> None:
        """Called once per computation of a step, after its last micro-batch."""
        self._complete = True

    def look_at_norm(self, norm: float) -> None:
        """Called on all ranks with the norm of the reduced gradients, before the weights change.

        Raises:
            _StepEnds: to `step`.
        """
        args, bad, loss = get_args(), "", math.nan
        if not math.isfinite(norm):
            bad = _NORM if args.check_for_nan_in_loss_and_grad else ""
        elif args.loss_jump:
            loss = self._loss_of_step()
            bad = bad_loss_rule.jump_of(args, loss) if math.isfinite(loss) else ""
        if bad or self.again:
            raise _StepEnds(bad)
        bad_loss_rule.took(args, loss)

    def _loss_of_step(self) -> float:
        """The mean over the global batch: each rank adds its share, and tensor-parallel ranks all the same one."""
        sums = torch.zeros(2, dtype=torch.float64, device="cuda")
        for micro_batch in self._micro_batches:
            if micro_batch.loss is not None:
                sums += torch.stack((micro_batch.loss, micro_batch.weight)).double()
        torch.distributed.all_reduce(sums)
        loss, weight = sums.tolist()
        return loss / weight if weight else math.nan

    def step(self, compute: Callable[[Any], Any], data_iterator: Any, model: list[torch.nn.Module]) -> Any:
        """In place of Megatron's `train_step`; see `steps.patch_steps`."""
        _check_buckets(model, False)
        try:
            result = compute(data_iterator)
        except _StepEnds as end:
            bad = end.bad
            get_timers()("optimizer", log_level=1).stop()  # or the next computation could not start it
        else:
            self._steps += 1
            return result
        reproducible = None
        if get_args().rerun_mode != "disabled":
            again = [self._read_again(chunk) for chunk in range(len(model))]
            reproducible = self._compute_again(compute, again if isinstance(data_iterator, list) else again[0], model)
        return self._end(bad, reproducible)

    def _read_again(self, chunk: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of the step for a part of the model."""
        return (micro_batch.again() for micro_batch in self._micro_batches if micro_batch.chunk == chunk)

    def _compute_again(self, compute: Callable[[Any], Any], data_iterator: Any, model: list[torch.nn.Module]) -> bool:
        """Whether the step is bad again."""
        _check_buckets(model, True)
        self.again = True
        try:
            compute(data_iterator)
        except _StepEnds as end:
            return bool(end.bad)
        finally:
            self.again = False
        raise AssertionError("the weights must not change in a second computation")

    def _end(self, bad: str, reproducible: bool | None) -> Any:
        """Ends or skips the step, or the run with a sentence; `reproducible` is `None` if it was computed only once."""
        findings: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(findings, self._finding(bad != _NORM))
        worst = max(findings, key=lambda one: (one.parameter != "", one.loss_is_bad, one.rejected != "", one.highest))
        args = get_args()
        if not worst.parameter and bad_loss_rule.may_skip(args):
            self._rejected = ""
            if args.rank == 0:
                say(f"{self._described(bad, worst, reproducible)}; the step is skipped, the weights stay as they are")
            return steps.skipped_step()
        saved = bool(reproducible and args.save and self._steps and args.curr_iteration % args.save_interval)
        sentence = self._sentence(bad, worst, reproducible, saved)
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

    def _finding(self, jumped: bool) -> _Finding:
        bad = [m for m in self._micro_batches if m.loss is not None and not bool(torch.isfinite(m.loss).all())]
        with_loss = [m for m in self._micro_batches if jumped and m.loss is not None and float(m.weight)]
        highest = max(with_loss, key=_mean_of, default=None)
        blamed = bad or ([highest] if highest else self._micro_batches)
        packs = sorted({number for micro_batch in blamed for number in micro_batch.packs})
        place = f"node {os.uname().nodename}, device {torch.cuda.current_device()!s}"
        parameter = next(self._bad_parameters(), "")
        return _Finding(
            rank=torch.distributed.get_rank(),
            place=place,
            rejected=self._rejected,
            packs=self._describe(packs),
            loss_is_bad=bool(bad),
            highest=_mean_of(highest) if highest else -math.inf,
            parameter=parameter,
        )

    def _bad_parameters(self) -> Iterator[str]:
        for model in self._models:
            yield from (name for name, p in model.named_parameters() if not bool(torch.isfinite(local_part(p)).all()))

    def _described(self, bad: str, finding: _Finding, reproducible: bool | None) -> str:
        """The step, what is bad in it, and whether it is again; then the packs, unless a parameter is to blame."""
        args = get_args()
        jumps = bad != _NORM
        if not jumps and (rejected := "the loss is NaN or infinite" if finding.loss_is_bad else finding.rejected):
            bad = f"{rejected} on rank {finding.rank} ({finding.place})"
        again = {True: ", and again when the step was computed a second time", None: ""}.get(
            reproducible, ", and not when the step was computed a second time: the machine is suspect and not the data"
        )
        what = f"step {args.curr_iteration + 1}: {bad}{again}"
        if finding.parameter or reproducible is False:
            return what
        if bad == _NORM:
            return f"{what}; it comes from one of the packs of the step"
        shown = f"neo-megatron inspect --packs {args.train_data_path[0]} --seed {args.seed} --pack N shows a pack"
        return f"{what}; {'most of it' if jumps else 'it'} comes from {finding.packs}; {shown}"

    def _sentence(self, bad: str, finding: _Finding, reproducible: bool | None, saved: bool) -> str:
        args = get_args()
        what = self._described(bad, finding, reproducible)
        if finding.parameter:
            return (
                f"{what}; the parameter {finding.parameter} itself is not finite, so the checkpoint that this run "
                "started from, or an earlier step, is spoilt: start from an earlier checkpoint with --ckpt-step"
            )
        untouched = f"the weights are untouched{f' and were saved in {args.save}' if saved else ''}"
        if args.on_bad_loss == "skip":
            untouched = f"{bad_loss_rule.MOST_SKIPPED} steps in a row were skipped before; {untouched}"
        if reproducible is False:
            return f"{what}; {untouched}: run the same command again, if it happens again then on another machine"
        skipped = " ".join(map(str, sorted({*args.iterations_to_skip, args.curr_iteration + 1})))
        return (
            f"{what}; {untouched}: run the same command with --iterations-to-skip {skipped} to leave out the packs of "
            "this step, or with a lower --lr"
        )


def _mean_of(micro_batch: _MicroBatch) -> float:
    return float(micro_batch.loss / micro_batch.weight)


def _check_buckets(model: list[torch.nn.Module], check: bool) -> None:
    """Whether Megatron looks at each bucket of gradients."""
    for chunk in model:
        chunk.ddp_config.check_for_nan_in_grad = check
