"""`torch.compile` as this package uses it, on a GPU only."""

import os
from collections.abc import Callable
from typing import Any

import torch

from neo_megatron.errors import ConfigError

# One graph each for trained and frozen layers, with and without gradients, for training's and evaluation's
# batches, for packs of each length. Beyond PyTorch's limit of 8 it would continue uncompiled: slow, or out of memory.
GRAPHS = 32


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function``, compiled for each shape: packs have few shapes, and graphs of fixed shapes are fastest.

    It never runs uncompiled: a call that would need another graph than the first `GRAPHS` raises
    `torch._dynamo.exc.FailOnRecompileLimitHit`.

    Raises:
        ConfigError: compiling is switched off.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise ConfigError(
            "TORCHDYNAMO_DISABLE=1: uncompiled, attention on a GPU would hold all scores in memory; unset it, "
            "or choose --attention-backend unfused"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    # A full graph, because beyond the limit PyTorch runs anything else uncompiled.
    return torch.compile(function, dynamic=False, fullgraph=True, **options)
