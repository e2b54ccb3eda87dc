"""The block sizes of FlexAttention's kernels that a device can hold, computed before anything is compiled.

NEO's queries and keys are 2D wide and its values D: at D = 128 the block sizes that PyTorch chooses for a
device need more shared memory than some devices have (99 KiB on sm_86, sm_89 and sm_120), and the first step fails when
it compiles. So an upper bound of the memory of each choice is estimated, and the first that fits is taken.

The estimate is that of the kernels' tiles: what stays for the entire loop, what is loaded ahead, once per stage, and
the scores that are laid out again for the second product. Triton often needs less: it keeps some of them in registers.
The order of preference for a device is that of PyTorch 2.11 for heads of 256, the width of queries and keys; it has not
been timed for values of 128. `tools/sweep_flex_attention.py` times all choices that fit.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

KIB = 1024
# Query and key rows of a block of the mask; tiles divide them.
FLEX_BLOCK = (128, 128)


@dataclass(frozen=True)
class Widths:
    """Channels of a head, and bytes of a number."""

    query_key: int
    value: int
    bytes: int = 2

    @property
    def row(self) -> int:
        """Bytes of a row of keys and values, as of one of queries and gradients of the output."""
        return (_power_of_two(self.query_key) + _power_of_two(self.value)) * self.bytes


@dataclass(frozen=True)
class Forward:
    """Tiles of ``rows`` queries, which stay, and ``keys`` keys and values, loaded ``stages`` at once."""

    rows: int
    keys: int
    stages: int
    warps: int

    def shared_memory(self, widths: Widths) -> int:
        """Bytes at most."""
        queries = self.rows * _power_of_two(widths.query_key) * widths.bytes
        return queries + self.stages * self.keys * widths.row + self.rows * self.keys * widths.bytes

    @property
    def options(self) -> dict[str, int]:
        names = ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps")
        return {f"fwd_{name}": value for name, value in zip(names, self._values, strict=True)}

    @property
    def _values(self) -> tuple[int, ...]:
        return self.rows, self.keys, self.stages, self.warps


@dataclass(frozen=True)
class Backward:
    """Of the two loops of the backward, each holds tiles of ``stays`` rows and loads tiles of ``moves`` rows.

    The first holds keys and values and loads queries, the second the other way around. PyTorch's kernel wants the
    first to be a multiple of the second.
    """

    moves: int
    stays: int
    stages: int
    warps: int

    def shared_memory(self, widths: Widths) -> int:
        """Bytes at most; weights and gradients of the scores are both laid out again."""
        return (self.stays + self.stages * self.moves) * widths.row + 2 * self.stays * self.moves * widths.bytes

    @property
    def options(self) -> dict[str, int]:
        blocks = {"BLOCK_M1": self.moves, "BLOCK_N1": self.stays, "BLOCK_M2": self.stays, "BLOCK_N2": self.moves}
        chosen = blocks | {"num_stages": self.stages, "num_warps": self.warps}
        return {f"bwd_{name}": value for name, value in chosen.items()}


# By major compute capability; what follows them is for smaller memories, down to the smallest tiles there are.
_FORWARD_FIRST = {8: Forward(32, 64, 3, 4), 9: Forward(64, 32, 3, 4), 10: Forward(64, 32, 3, 4)}
_FORWARD = (
    Forward(64, 64, 2, 4),
    Forward(64, 32, 3, 4),
    Forward(64, 32, 2, 4),
    Forward(32, 32, 2, 4),
    Forward(32, 16, 2, 4),
    Forward(16, 16, 1, 4),
)
_BACKWARD_FIRST = {8: Backward(64, 64, 2, 4), 9: Backward(64, 64, 2, 4), 10: Backward(64, 64, 1, 4)}
_BACKWARD = (
    Backward(64, 64, 1, 4),
    Backward(32, 64, 1, 4),
    Backward(32, 32, 2, 4),
    Backward(32, 32, 1, 4),
    Backward(16, 16, 1, 4),
)


def kernel_options(widths: Widths, capability: tuple[int, int], shared_memory: int) -> dict[str, Any] | None:
    """FlexAttention's ``kernel_options`` for a device, or None where no block size fits.

    Args:
        capability: such as (9, 0).
        shared_memory: bytes that one block of threads may have, `shared_memory_per_block_optin` of the device.
    """
    major = capability[0]
    forward = _first_that_fits((_FORWARD_FIRST.get(major), *_FORWARD), widths, shared_memory)
    backward = _first_that_fits((_BACKWARD_FIRST.get(major), *_BACKWARD), widths, shared_memory)
    return None if forward is None or backward is None else forward.options | backward.options


def all_that_fit(widths: Widths, shared_memory: int) -> tuple[list[Forward], list[Backward]]:
    """Every choice worth timing on a device with this much shared memory."""
    sizes, stages, warps = (32, 64, 128), (1, 2, 3, 4), (4, 8)
    forward = [Forward(*choice) for choice in product(sizes, sizes, stages, warps)]
    backward = [Backward(*choice) for choice in product(sizes, sizes, stages, warps) if choice[1] % choice[0] == 0]
    return (
        [choice for choice in forward if choice.shared_memory(widths) <= shared_memory],
        [choice for choice in backward if choice.shared_memory(widths) <= shared_memory],
    )


def _first_that_fits[Tiles: (Forward, Backward)](
    choices: tuple[Tiles | None, ...], widths: Widths, shared_memory: int
) -> Tiles | None:
    fitting = (choice for choice in choices if choice and choice.shared_memory(widths) <= shared_memory)
    return next(fitting, None)


def _power_of_two(width: int) -> int:
    """Triton's tiles are powers of two wide, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())
