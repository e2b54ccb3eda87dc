"""A model larger than memory, run once: every part gets its weights when its turn comes, and drops them after it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def stream_weights(part: nn.Module, weights: Callable[[], dict[str, Tensor]], keep: bool = False) -> None:
    """Has ``part`` fetch its weights before its forward pass and drop them after it.

    Args:
        weights: name in ``part`` -> value; called once for each pass. Missing and unexpected names are errors.
        keep: do not drop them, for weights that another part reads too.
    """
    part.to("meta")

    def fetch(_part: nn.Module, _inputs: tuple) -> None:
        part.load_state_dict(weights(), strict=True, assign=True)

    def drop(_part: nn.Module, _inputs: tuple, _output: Any) -> None:
        part.to("meta")

    part.register_forward_pre_hook(fetch)
    if not keep:
        part.register_forward_hook(drop)


def keep_output(part: nn.Module, name: str, seen: dict[str, Tensor]) -> None:
    """Notes under ``name`` what ``part`` returns, on the CPU; of several results the first.

    A copy: Megatron's cross entropy computes in place of the logits.
    """

    def note(_part: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        seen[name] = (output[0] if isinstance(output, tuple) else output).detach().to("cpu", copy=True)

    part.register_forward_hook(note)
