"""`torch.compile` as this package uses it, on a GPU only."""

from collections.abc import Callable
from typing import Any

import torch

# One graph each for trained and frozen layers, with and without gradients, for training's and evaluation's
# batches. Beyond PyTorch's limit of 8 it would continue uncompiled with no more than a warning: slow, or out of memory.
GRAPHS = 32


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function``, compiled for each shape: packs have few shapes, and graphs of fixed shapes are fastest."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return torch.compile(function, dynamic=False, **options)
