"""Logs scalars to all trackers of a run, through Megatron's writers and under NEO's tags.

Megatron logs to Weights & Biases only where it also logs to TensorBoard, calls packs samples, and logs the test set as
the validation set. Its writers are replaced by these: whichever of them is given a scalar, TensorBoard gets it at once,
and Weights & Biases, MLflow and the run's own file get all scalars of a step together.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from torch.utils.tensorboard import SummaryWriter

from neo_megatron.megatron_compat import hooks
from neo_megatron.run.mlflow_run import MlflowRun
from neo_megatron.run.scalar_file import ScalarFile

PAIR_RATIO = "computed-to-allowed attention pair ratio"  # in Megatron's line of a step, which is also its tag
# Parts of tags -> what is logged instead.
_WORDS = {
    PAIR_RATIO: "attention/computed-to-allowed ratio",
    " vs samples": " vs packs",
    "skipped-train-samples": "skipped-train-packs",
    "samples vs steps": "packs vs steps",
}
_AT_PACKS = " vs packs"  # the end of tags whose step is a number of packs; of use in TensorBoard only


class LogWriters:
    """The writers of this rank, if it has any: Megatron logs on the last rank.

    Attributes:
        split: the split that is being evaluated.

    Args:
        open_file: opens the run's own file when the first scalar is written; ``None`` for a rank or run without one.
        mlflow: ``None`` for a rank or run without it.
    """

    def __init__(
        self,
        tensorboard: Any,
        wandb: Any,
        open_file: Callable[[], ScalarFile] | None = None,
        mlflow: MlflowRun | None = None,
    ) -> None:
        self.split = "validation"
        self._open_file = open_file
        self._file: ScalarFile | None = None
        self._step = 0
        self._scalars: dict[str, float] = {}  # of the step
        self._wandb, self._mlflow = wandb, mlflow
        self.wandb = wandb and _Wandb(wandb, self)
        self._to_tensorboard = tensorboard and tensorboard.add_scalar
        self.tensorboard = tensorboard or ((wandb or open_file or mlflow) and _Nowhere())
        if self.tensorboard:  # stays a SummaryWriter, which Megatron's timers check for
            self.tensorboard.add_scalar = lambda tag, scalar_value, global_step: self._add(
                self.named(tag), scalar_value, global_step
            )

    @classmethod
    def take_over(
        cls, open_file: Callable[[], ScalarFile] | None = None, mlflow: MlflowRun | None = None
    ) -> "LogWriters":
        """Replaces Megatron's writers of this process."""
        writers = cls(get_tensorboard_writer(), get_wandb_writer(), open_file, mlflow)
        hooks.use_writers(writers.tensorboard, writers.wandb)
        return writers

    def keep(self, facts: Mapping[str, str]) -> None:
        """Gives the facts of the run to TensorBoard and Weights & Biases, in addition to its arguments."""
        if self._to_tensorboard:
            for name, text in facts.items():
                self.tensorboard.add_text(name, text)
        if self._wandb:
            self._wandb.config.update(dict(facts))

    def end(self) -> None:
        """Writes what is left and ends the run of MLflow; Megatron ends the others."""
        self.flush()
        if self._mlflow:
            self._mlflow.end()

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Logs scalars under tags of ours."""
        if self.tensorboard:
            for tag, value in scalars.items():
                self._add(tag, value, step)

    def _add(self, tag: str, value: Any, step: int) -> None:
        if self._to_tensorboard:
            self._to_tensorboard(tag, value, step)
        self.collect(tag, value, step)

    def collect(self, tag: str, value: Any, step: int) -> None:
        """Keeps a scalar for those that get all of a step together; a second one of a tag takes the place of the first.

        Args:
            value: a number or a tensor of one.
        """
        if tag.endswith(_AT_PACKS):
            return
        if step != self._step:
            self.flush()
            self._step = step
        self._scalars[tag] = float(value)

    def flush(self) -> None:
        """Writes what was collected of a step."""
        if not self._scalars:
            return
        scalars, self._scalars = self._scalars, {}
        if self._wandb:
            self._wandb.log(scalars, self._step)
        if self._mlflow:
            self._mlflow.write(self._step, scalars)
        if self._open_file:
            self._file = self._file or self._open_file()
            self._file.write(self._step, scalars)

    def named(self, tag: str) -> str:
        """The tag under which one of Megatron's is logged."""
        for theirs, ours in _WORDS.items():
            tag = tag.replace(theirs, ours)
        return tag if self.split == "validation" else tag.replace(" validation", f" {self.split}")


class _Wandb:
    """The module `wandb` with renamed tags; equal to it, which Megatron's timers check for."""

    def __init__(self, module: Any, writers: LogWriters) -> None:
        self._module, self._writers = module, writers

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for tag, value in values.items():
            self._writers.collect(self._writers.named(tag), value, step)

    def __eq__(self, other: object) -> bool:
        return other is self._module or other is self

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Nowhere(SummaryWriter):
    """A writer that keeps nothing, in place of TensorBoard's where others are on."""

    def __init__(self) -> None:
        """Opens no file."""

    def add_text(self, *_: Any, **__: Any) -> None:
        pass

    flush = close = add_text
