"""Adds figures of NEO's work to Megatron's log of training steps, in NEO's terms.

Megatron's formula of operations is that of a causal model that trains everything: for NEO it is 1.1 to 1.8 times too
high. Here they are those of `planning/flops.py` for what the packs of each step hold, so that TFLOP/s, tokens/s and MFU
can be compared with a plan. Megatron also counts packs as "samples", spoils the mean loss of an interval by a step
without loss weight, and logs the last validation twice; `megatron_compat.hooks.log_with` puts this module in its place.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import get_timers
from megatron.training.utils import is_last_rank
from torch import Tensor

from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.planning.flops import model_flops
from neo_megatron.planning.hardware import gpu_named
from neo_megatron.planning.layout import precision_of
from neo_megatron.planning.packs import PackCounts, count_packs
from neo_megatron.run.console import say
from neo_megatron.run.expert_log import ExpertLog
from neo_megatron.run.log_writers import LogWriters
from neo_megatron.run.looking import LookingLog
from neo_megatron.run.loss_sums import Losses, LossSums
from neo_megatron.run.mlflow_run import MlflowRun
from neo_megatron.run.module_rates import stage_at_work
from neo_megatron.run.run_facts import facts_of
from neo_megatron.run.scalar_file import ScalarFile
from neo_megatron.run.stragglers import Stragglers, compare, default_store

LOSS = "lm loss"
_STEP = re.compile(r" \[[^]]*\] iteration +\d+/ *\d+ \|")
_BEFORE = " global batch size:"  # the figures go here, in Megatron's line of a step


@dataclass(frozen=True)
class Counted:
    """Packs, loss weight and broken samples that a step has read.

    Args:
        weight: the sum of all loss weights; known on the last pipeline stage, as `broken` is.
        broken: samples with a broken image.
    """

    packs: PackCounts = PackCounts()
    weight: float = 0.0
    broken: int = 0

    @classmethod
    def of(cls, micro_batch: dict[str, Any]) -> "Counted":
        weight = micro_batch["target_weight"].double().sum().item()
        return cls(count_packs(micro_batch), weight, len(micro_batch["broken"]))

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(self.packs + other.packs, self.weight + other.weight, self.broken + other.broken)

    def over_ranks(self) -> "Counted":
        """Summed over data-parallel ranks, which read different packs; all other ranks read the same as one of them."""
        group = parallel_state.get_data_parallel_group()
        if group.size() == 1:
            return self
        numbers = [*astuple(self.packs), self.weight, self.broken]
        sums = torch.tensor(numbers, dtype=torch.float64, device="cuda")
        torch.distributed.all_reduce(sums, group=group)
        *packs, weight, broken = sums.tolist()
        return Counted(PackCounts(*map(round, packs)), weight, round(broken))


class StepLog:
    """The log of a run: one per process, begun for each run.

    Attributes:
        stragglers: measures this rank's own time.
    """

    def __init__(self) -> None:
        self._writers: LogWriters | None = None
        self._experts = ExpertLog(0, 0)
        self._looking = LookingLog(0)
        self._step_losses, self._interval_losses = LossSums(), LossSums()
        self._rates: Callable[[], Mapping[str, float]] = dict
        self.stragglers = Stragglers(0, 1)

    def take_rates(self, rates: Callable[[], Mapping[str, float]]) -> None:
        """Adds scaled learning rates to the scalars that are written."""
        self._rates = rates

    def begin(self, args: Namespace) -> None:
        """To be called when Megatron has its arguments and its writers, before it trains."""
        self._args = args
        self._sizes = NeoSizes(**args.neo_sizes)
        self._peak = _peak(args)
        self._writers = _take_over_writers(args)
        self._reading = Counted()  # of the step that is at work
        self._step = Counted()  # the last one
        self._interval = Counted()  # since the last line
        self._unwritten = Counted()  # since TensorBoard was written last
        self._weightless = 0  # steps of the interval without loss weight
        self._seconds = 0.0  # of training, before the interval
        self._in_line = False
        self._validated: int | None = None
        self._experts = ExpertLog(self._sizes.num_layers, self._sizes.num_experts)
        self._looking = LookingLog(self._sizes.num_layers)
        self._step_losses, self._interval_losses = LossSums(), LossSums()
        self._losses: Losses | None = None  # of the interval that ends
        self.stragglers = Stragglers(args.rank, args.world_size)

    def end(self) -> None:
        """To be called when the run ends, however it does."""
        if self._writers:
            self._writers.end()

    def watch(self, model: NeoModel) -> None:
        """To be called with each chunk of the model."""
        self._experts.watch(model)
        self._looking.watch(model)

    def note(self, micro_batch: dict[str, Any]) -> None:
        """Counts a micro-batch of a training step, before it is split over context-parallel ranks."""
        self._reading += Counted.of(micro_batch)

    def note_loss(self, data_sets: tuple[str, ...], group_M: Tensor, weight_M: Tensor, nll_M: Tensor) -> None:
        """Adds the losses of a micro-batch of a step or of an evaluation; see `LossSums.add`."""
        sums = self._step_losses if torch.is_grad_enabled() else self._looking.losses
        sums.add(data_sets, group_M, weight_M, nll_M)

    def note_evaluation(self, packs: dict[str, Any]) -> None:
        """Counts a micro-batch of an evaluation."""
        self._looking.note(packs)

    def end_step(self) -> tuple[None, None]:
        """In place of Megatron's statistics of packed sequences, which it collects once in a step, on all ranks."""
        self._step, self._reading = self._reading.over_ranks(), Counted()
        self._interval += self._step
        self._unwritten += self._step
        return None, None

    def operations(self, args: Namespace, batch_size: int, *_: Any, **__: Any) -> float:
        """Floating-point operations of a step of so many packs: of the last one, or of the interval's mean in its line.

        In place of Megatron's formula. What is computed again in the backward is not counted; padding is.
        """
        packs = (self._interval if self._in_line else self._step).packs
        return self._flops(packs) / packs.packs * batch_size if packs.packs else 0.0

    def _flops(self, packs: PackCounts) -> float:
        workload, stage = packs.workload(), stage_at_work(self._args)
        return model_flops(self._sizes, stage, workload).total(self._sizes).model * packs.tokens

    def training_log(
        self,
        log: Callable[[dict[str, torch.Tensor], bool], Any],
        loss_dict: dict[str, torch.Tensor],
        total_loss_dict: dict[str, Any],
        iteration: int,
        skipped: int,
        first: bool,
    ) -> Any:
        """Megatron's log of a step, with figures.

        Args:
            log: Megatron's, which takes the losses of the step and whether it shall log it as the first after a start,
                in addition to all intervals.
            total_loss_dict: Megatron's sums over the interval.
        """
        ends_interval = iteration % self._args.log_interval == 0
        first = first and not ends_interval  # else the first step would be in the next line, too
        loss_dict, sums = self._leave_out_weightless(loss_dict, total_loss_dict, skipped, ends_interval or first)
        writes = iteration % self._args.tensorboard_log_interval == 0
        experts = self._experts.gather() if writes or ends_interval or skipped else {}
        if skipped:  # nor does Megatron count its loss
            experts, self._step_losses = {}, LossSums()
        self._interval_losses.take(self._step_losses)
        self._losses = self._interval_losses.reduce()[0] if ends_interval else None
        self._in_line = True
        result = log(loss_dict, first)
        self._in_line = False
        self._writers.write(experts, iteration)
        if writes:
            counts = self._unwritten
            self._writers.write(
                {
                    "data/padding fraction": _padding(counts),
                    "data/broken samples": counts.broken,
                    **self._rates(),
                    "packs vs steps": self._args.consumed_train_samples,
                },
                iteration,
            )
            self._unwritten = Counted()
        if ends_interval:
            performance = {f"performance/{name}": value for name, value in self._performance().items()}
            self._writers.write(performance, iteration)
            self._writers.write(self._losses.scalars(LOSS), iteration)
            self._interval, self._weightless = Counted(), 0
            self._seconds = _training_seconds()
        else:
            total_loss_dict.update(sums)
        self._name_straggler(iteration)
        self._writers.flush()
        return result

    def _name_straggler(self, iteration: int) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        scalars, sentence = compare(self.stragglers.end_step(iteration, stage, default_store()))
        self._writers.write(scalars, iteration)
        if sentence:
            say(sentence)

    def _leave_out_weightless(
        self, loss_dict: dict[str, torch.Tensor], total_loss_dict: dict[str, Any], skipped: int, prints: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Keeps a step without loss weight, whose loss is 0/0, out of the mean of its interval.

        Megatron adds the step's loss to the sum of the interval and divides it by all steps that were not skipped. So
        that it prints the mean over those with weight, the sum is scaled for the line.

        Returns:
            The losses to log, and the sum to put back after a line that does not end the interval.
        """
        if LOSS not in loss_dict:  # on other pipeline stages
            return loss_dict, {}
        added = 0.0 if skipped else loss_dict[LOSS]
        if not self._step.weight:
            loss_dict = {name: value for name, value in loss_dict.items() if name != LOSS}
            added = 0.0
            self._weightless += not skipped
        if not (self._weightless and prints):
            return loss_dict, {}
        advanced = total_loss_dict.get("advanced iterations", 0) + (not skipped)
        total = total_loss_dict.get(LOSS, torch.zeros(1, device="cuda")) + added
        weighted = advanced - self._weightless
        scale = advanced / weighted if weighted else float("nan")  # Megatron prints no NaN
        total_loss_dict[LOSS] = total * scale - added
        return loss_dict, {LOSS: total}

    def line(self, message: str) -> str:
        """A line of Megatron's log, with figures and in our words."""
        if self._writers is None:  # of a dry run
            return message
        if message.startswith("Evaluating on "):
            return f"Evaluating on {int(message.split()[2]) // self._args.evaluation_views} packs"
        if self._writers.split == "test":
            message = message.replace(" validation loss at ", " test loss at ")
        if not (self._in_line and _STEP.match(message)):
            return message
        for kind in ("consumed", "skipped"):
            message = message.replace(f" {kind} samples:", f" {kind} packs:")
        figures = [f"{name}: {value:.1f}" for name, value in self._performance().items()]
        figures += [
            *(self._losses.line() if self._losses else []),
            *self._experts.line,
            f"padding fraction: {_padding(self._interval):.4f}",
            f"samples with a broken image: {self._interval.broken}",
        ]
        if self._weightless:
            figures.append(f"steps without loss weight: {self._weightless}")
        return message.replace(_BEFORE, "".join(f" {figure} |" for figure in figures) + _BEFORE, 1)

    def evaluate(self, evaluate: Callable[[], None], prefix: str, iteration: int) -> None:
        """Megatron's evaluation of a split, unless it would validate a second time after the last step.

        Args:
            prefix: of Megatron's log line, which names the split after training.
        """
        self._writers.split = "test" if prefix.endswith(" on test set") else "validation"
        if self._writers.split == "validation":
            if self._validated == iteration:
                return
            self._validated = iteration
        evaluate()
        looking, split = self._looking.gather(), self._writers.split
        if self._args.evaluation_cut_short:  # after views of different packs; the run ends
            return
        self._writers.write(looking.losses.scalars(f"{LOSS} {split}") | looking.scalars(split), iteration)
        if is_last_rank():
            for line in (*looking.losses.line(), *looking.line()):
                say(f"iteration {iteration} | {split} {line}")
        self._writers.flush()
        self._writers.split = "validation"

    def _performance(self) -> dict[str, float]:
        """Of the interval until now; per GPU, because layouts are compared so."""
        packs, seconds = self._interval.packs, _training_seconds() - self._seconds
        if not packs.packs or not seconds:
            return {}
        gpu_seconds = seconds * self._args.world_size
        figures = {"tokens per second per GPU": packs.tokens / gpu_seconds}
        if self._peak:
            figures["MFU (%)"] = 100 * self._flops(packs) / (gpu_seconds * self._peak)
        return figures


def _take_over_writers(args: Namespace) -> LogWriters:
    """The writers of this rank; the last one has some."""
    if args.rank < args.world_size - 1:
        return LogWriters.take_over()
    facts = facts_of(args) if args.mlflow_dir or args.wandb_project or args.tensorboard_dir else {}
    mlflow = None
    if args.mlflow_dir:
        name = args.wandb_exp_name or Path(args.save or args.mlflow_dir).name
        mlflow = MlflowRun(args.mlflow_dir, name, vars(args), facts)
    # The file is opened when the run has loaded its checkpoint, and knows its step.
    writers = LogWriters.take_over(partial(_open_file, args) if args.save else None, mlflow)
    writers.keep(facts)
    return writers


def _open_file(args: Namespace) -> ScalarFile:
    return ScalarFile(args.save, args.iteration)


def _padding(counts: Counted) -> float:
    """Share of the tokens that are padding, from 0 to 1."""
    return counts.packs.padding / max(counts.packs.tokens, 1)


def _training_seconds() -> float:
    """Since training began, without evaluations and saves, as Megatron counts its time of a step."""
    return get_timers()("interval-time").active_time()


def _peak(args: Namespace) -> float | None:
    """Operations per second of a GPU; ``None`` without one whose rate is stated."""
    if cpu_platform.on_cpu():
        return None
    device = torch.cuda.get_device_properties(0).name
    gpu = gpu_named(device)
    if gpu is None:
        if args.rank == 0:
            say(f"MFU is not logged: {device} has no stated rate in planning/hardware.py")
        return None
    return gpu.peak(precision_of(args))
