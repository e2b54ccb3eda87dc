"""Our side: `pretraining.train()` with the flags of a user, on packs that are in memory already.

Nothing of Megatron is replaced: the data iterator, which pretrain_neo hands to it, measures from step to step. Reading
packs is measured elsewhere (`neo-megatron benchmark data --only loader`).
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from neo_megatron.benchmarks.gpu_window import SEED, Meter, Windows


def prepare() -> None:
    """Sets the environment of a run of one process, on a free port, and imports what `run` needs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # As in examples/train.sh; CUDA and PyTorch read them once.
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from neo_megatron.run import pretraining  # noqa: F401


def run(report: Callable[[dict[str, Any]], None], windows: Windows, model: Path, flags: Sequence[str]) -> None:
    """Reports every window.

    Args:
        model: directory with the config.json of the sizes.
        flags: of pretrain_neo; they follow those that all runs have, and win.
    """
    from neo_megatron.run import pretraining

    meter = Meter(windows, report)
    forward_step = pretraining.forward_step

    def datasets_provider(*_, **__) -> tuple[Iterator, None, None]:
        return meter.batches(pinned), None, None

    def noting_losses(*given: Any) -> tuple[Any, Callable]:
        output, loss_function = forward_step(*given)

        def reduce(*given: Any) -> tuple[Any, Any, dict[str, Any]]:
            loss, count, logged = loss_function(*given)
            total, weight = logged["lm loss"].unbind()
            meter.losses.append(total / weight)
            return loss, count, logged

        return output, reduce

    datasets_provider.is_distributed = True
    vars(pretraining).update(datasets_provider=datasets_provider, forward_step=noting_losses)
    sys.argv = ["pretrain_neo", *arguments(windows, model), *flags]
    try:
        pretraining.train()
    except StopIteration:  # Megatron has requested more steps than are measured
        return


def pinned(pack: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch in pinned memory, as the loader of pretrain_neo returns it."""
    import torch

    pack = {**pack, "packs": [0], "describe": str, "again": lambda: pack, "data_sets": ("drawn",)}
    if torch.cuda.is_available():
        pack |= {key: value.pin_memory() for key, value in pack.items() if torch.is_tensor(value)}
    return pack


def arguments(windows: Windows, model: Path) -> list[str]:
    """The command line that all runs share."""
    chosen: dict[str, Any] = {
        "--neo-model": model,
        "--training-stage": windows.training_stage,
        "--seq-length": max(windows.lengths),
        "--seed": SEED,
        "--micro-batch-size": 1,
        "--global-batch-size": 1,
        "--train-iters": 100_000,
        "--lr-warmup-iters": 0,
        "--log-interval": 100_000,
        "--num-workers": 0,
    }
    return [str(part) for flag in chosen.items() for part in flag]
