"""Logs scalars to TensorBoard and Weights & Biases, through Megatron's writers and under NEO's tags.

Megatron logs to Weights & Biases only where it also logs to TensorBoard, calls packs samples, and logs the test set as
the validation set. Its writers are replaced by these, which pass on all that they are given.
"""

from collections.abc import Mapping
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from neo_megatron.megatron_compat import hooks

PAIR_RATIO = "computed-to-allowed attention pair ratio"  # in Megatron's line of a step, which is also its tag
# Parts of tags -> what is logged instead.
_WORDS = {
    PAIR_RATIO: "attention/computed-to-allowed ratio",
    " vs samples": " vs packs",
    "skipped-train-samples": "skipped-train-packs",
    "samples vs steps": "packs vs steps",
}


class LogWriters:
    """The writers of this rank, if it has any: Megatron logs on the last rank.

    Attributes:
        split: the split that is being evaluated.
    """

    def __init__(self, tensorboard: Any, wandb: Any) -> None:
        self.split = "validation"
        self.wandb = wandb and _Wandb(wandb, self)
        self.tensorboard = tensorboard or (wandb and _Nowhere())
        if tensorboard:  # stays a SummaryWriter, which Megatron's timers check for
            add_scalar = tensorboard.add_scalar
            tensorboard.add_scalar = lambda tag, *rest, **more: add_scalar(self.named(tag), *rest, **more)

    @classmethod
    def take_over(cls) -> "LogWriters":
        """Replaces Megatron's writers of this process."""
        writers = cls(get_tensorboard_writer(), get_wandb_writer())
        hooks.use_writers(writers.tensorboard, writers.wandb)
        return writers

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        for tag, value in scalars.items():
            if self.tensorboard:
                self.tensorboard.add_scalar(tag, value, iteration)
            if self.wandb:
                self.wandb.log({tag: value}, iteration)

    def named(self, tag: str) -> str:
        """The tag under which one of Megatron's is logged."""
        for theirs, ours in _WORDS.items():
            tag = tag.replace(theirs, ours)
        return tag if self.split == "validation" else tag.replace(" validation", f" {self.split}")


class _Wandb:
    """The module `wandb` with renamed tags; equal to it, which Megatron's timers check for."""

    def __init__(self, module: Any, writers: LogWriters) -> None:
        self._module, self._writers = module, writers

    def log(self, values: Mapping[str, Any], *rest: Any, **more: Any) -> None:
        self._module.log({self._writers.named(tag): value for tag, value in values.items()}, *rest, **more)

    def __eq__(self, other: object) -> bool:
        return other is self._module or other is self

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Nowhere:
    """A writer that drops everything, in place of TensorBoard's for Weights & Biases alone."""

    def add_scalar(self, *_: Any, **__: Any) -> None:
        pass

    add_text = flush = close = add_scalar
