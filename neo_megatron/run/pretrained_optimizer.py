"""The optimizer's state of the stage before: `--pretrained-optimizer` adds it to what `--pretrained-checkpoint` loads.

Megatron starts from another run's checkpoint either with its model alone or, to resume it, with everything: the
optimizer's state of exactly the parameters that train now, the schedule and the count of samples. A stage that trains
more than the one before it wants something between. Parameters that both train keep their moments (and their float32
copies, where the model is in bf16), those that begin to train start with moments of zero, and all else starts as in a
new run.
Adam's count of steps comes along too. It is one for all parameters, so that the new ones have no correction of their
young moments: with betas of 0.9 and 0.95 their first step is 2.2 times shorter than it would be.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.errors import ConfigError
from neo_megatron.run.optimizer_state import has_moments, is_by_ranks, load_state
from neo_megatron.run.ranks import on_rank_0


def check_flags(args: Namespace) -> None:
    """Raises ConfigError where `--pretrained-optimizer` has nothing to take state from, or no place to put it."""
    if not args.pretrained_optimizer:
        return
    if not args.pretrained_checkpoint:
        raise ConfigError("--pretrained-optimizer needs --pretrained-checkpoint, whose optimizer state it takes over")
    if args.optimizer == "sgd":
        raise ConfigError("--pretrained-optimizer takes over the state of --optimizer adam or muon: leave it out")


def take_over_state(optimizer: MegatronOptimizer, model: list[torch.nn.Module], checkpoint: str | Path) -> str:
    """Fills the state of a new optimizer from a checkpoint. A call on all ranks, after the model was loaded.

    Args:
        model: this rank's chunks.
        checkpoint: a directory that ``--save`` has filled, or one iteration of it.

    Returns:
        A sentence that counts the parameters of this rank's chunks.

    Raises:
        ConfigError: the checkpoint has no state, one of another optimizer, or only one that fits its own layout.
    """
    directory = on_rank_0(partial(_directory_with_state, checkpoint, optimizer.config.optimizer))
    loaded = load_state(optimizer, model, directory)
    return (
        f"optimizer state of {directory} after {loaded.step} steps, on the first rank: taken over for "
        f"{loaded.known} parameters, zero for {loaded.fresh} that begin to train"
    )


def _directory_with_state(checkpoint: str | Path, optimizer: str) -> Path:
    saved = TorchDistDirectory(checkpoint)
    check_state(saved, optimizer)
    return saved.directory


def check_state(saved: TorchDistDirectory, optimizer: str) -> None:
    """Raises ConfigError where a checkpoint has no state of this optimizer to take over."""
    if has_moments(saved):
        there = getattr(saved.common_state()["args"], "optimizer", optimizer)
        if there != optimizer:
            raise ConfigError(
                f"--pretrained-optimizer: {saved.directory} holds the state of --optimizer {there}, and this run has "
                f"{optimizer}: choose --optimizer {there}, or leave the flag out"
            )
        return
    if is_by_ranks(saved):
        raise ConfigError(
            f"--pretrained-optimizer: {saved.directory} holds its optimizer state by ranks, not by parameters: "
            "save it again with --dist-ckpt-optim-fully-reshardable, or leave the flag out"
        )
    raise ConfigError(
        f"--pretrained-optimizer: {saved.directory} has no optimizer state (converted, or saved with --no-save-optim): "
        "leave the flag out"
    )
