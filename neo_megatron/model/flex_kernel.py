"""The block sizes of FlexAttention's kernels that a device can hold, computed before anything is compiled.

NEO's queries and keys are 2D wide and its values D: at D = 128 the block sizes that PyTorch chooses for a
device need more shared memory than some devices have (99 KiB on sm_86, sm_89 and sm_120), and the first step fails when
it compiles. So an upper bound of the memory of each choice is estimated, and the first that fits is taken.

The estimate is that of the kernels' tiles: what stays for the entire loop, what is loaded ahead, once per stage, and
the scores that are laid out again for the second product. Triton often needs less: it keeps some of them in registers.
On sm_100 it may need more, for operands of products that are in tensor memory elsewhere: of the tiles below up to
17.3 KiB in a backward (32, 64, 64, 32: 121.2 KiB, estimated 104) and 1.6 KiB in the largest, which holds 225.6 of 227.
No bound would leave these their place, so those of sm_100 are known to fit because they were compiled.
The order of preference comes from the kernels' machine code: largest tiles first, of those that spill no registers
(`tests/kernels/test_attention.py`); nothing has been timed. `tools/sweep_flex_attention.py` times all choices that fit.
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
    """Tiles of the two loops of the backward, whose four sizes are independent but for what PyTorch's kernel asks.

    Args:
        queries_1, keys_1: the first loop holds ``keys_1`` keys and values and loads ``queries_1`` queries and gradients
            of the output, which divides it.
        queries_2, keys_2: the second holds ``queries_2`` queries and loads ``keys_2`` keys, which divides it.
    """

    queries_1: int
    keys_1: int
    queries_2: int
    keys_2: int
    stages: int
    warps: int

    def shared_memory(self, widths: Widths) -> int:
        """Bytes at most, of the larger loop; weights and gradients of the scores are both laid out again."""
        return max(
            (stays + self.stages * moves) * widths.row + 2 * stays * moves * widths.bytes
            for stays, moves in ((self.keys_1, self.queries_1), (self.queries_2, self.keys_2))
        )

    @property
    def options(self) -> dict[str, int]:
        names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps")
        return {f"bwd_{name}": value for name, value in zip(names, self._values, strict=True)}

    @property
    def _values(self) -> tuple[int, ...]:
        return self.queries_1, self.keys_1, self.queries_2, self.keys_2, self.stages, self.warps


# By major compute capability, of numbers of 16 bits; what follows them is for smaller memories, down to the smallest
# tiles there are. Of 255 registers a thread, sums of 64 keys in the backward take 96 in eight warps.
_FORWARD_FIRST = {8: Forward(128, 64, 2, 8), 9: Forward(128, 64, 2, 8), 10: Forward(128, 64, 2, 8)}
_FORWARD = (
    Forward(64, 64, 2, 4),
    Forward(64, 32, 2, 4),
    Forward(32, 32, 2, 4),
    Forward(32, 16, 2, 4),
    Forward(16, 16, 1, 4),
)
_BACKWARD_FIRST = {
    8: Backward(16, 64, 64, 16, 2, 8),
    9: Backward(32, 64, 128, 64, 2, 8),
    10: Backward(32, 64, 128, 64, 2, 8),  # spills 16 bytes of a thread; tiles half as large would not
}
_BACKWARD = (
    Backward(32, 32, 32, 32, 2, 8),
    Backward(32, 32, 32, 32, 1, 8),
    Backward(16, 16, 16, 16, 1, 4),
)
# Products in float32 have no tensor cores and are unrolled: larger tiles compile for minutes and spill kilobytes.
_FORWARD_FLOAT32 = (Forward(32, 32, 2, 8), Forward(32, 16, 2, 8), Forward(16, 16, 1, 4))
_BACKWARD_FLOAT32 = (Backward(16, 16, 16, 16, 1, 8),)
# Worth timing in addition to the first choice, by compute capability and channels of a key and a value, in 16 bits:
# compiled, they spill nothing (`tests/kernels/test_attention.py`). Each pair takes a compilation of up to 40 s.
_TIMED = {
    ((8, 0), 256, 128): ((Forward(128, 32, 2, 8), Backward(32, 32, 32, 32, 2, 8)),),
    ((8, 0), 128, 128): ((Forward(64, 64, 2, 4), Backward(32, 32, 32, 32, 2, 8)),),
    ((9, 0), 256, 128): (
        (Forward(128, 64, 3, 8), Backward(32, 64, 128, 32, 2, 8)),
        (Forward(64, 64, 2, 4), Backward(32, 64, 64, 32, 2, 8)),
    ),
    ((9, 0), 128, 128): (
        (Forward(128, 64, 3, 8), Backward(32, 64, 128, 32, 2, 8)),
        (Forward(128, 128, 2, 8), Backward(64, 64, 64, 64, 2, 8)),
    ),
    ((10, 0), 128, 128): ((Forward(128, 64, 3, 8), Backward(64, 64, 64, 64, 2, 8)),),
}


def kernel_options(widths: Widths, capability: tuple[int, int], shared_memory: int) -> dict[str, Any] | None:
    """FlexAttention's ``kernel_options`` for a device, or None where no block size fits.

    Args:
        capability: such as (9, 0).
        shared_memory: bytes that one block of threads may have, `shared_memory_per_block_optin` of the device.
    """
    forwards, backwards = _choices(widths, capability[0])
    forward = _first_that_fits(forwards, widths, shared_memory)
    backward = _first_that_fits(backwards, widths, shared_memory)
    return None if forward is None or backward is None else forward.options | backward.options


def choices_to_time(widths: Widths, capability: tuple[int, int], shared_memory: int) -> list[dict[str, int]]:
    """`kernel_options` worth timing on a device, that of the table first: pairs of both directions, compiled together.

    One at most where nothing else is known to spill no more than the table's choice.
    """
    first = kernel_options(widths, capability, shared_memory)
    if first is None:
        return []
    others = _TIMED.get((capability, widths.query_key, widths.value), ()) if widths.bytes == 2 else ()
    fitting = [pair for pair in others if all(tiles.shared_memory(widths) <= shared_memory for tiles in pair)]
    return [first, *(forward.options | backward.options for forward, backward in fitting)]


def one_direction(options: dict[str, int], prefix: str) -> dict[str, int]:
    """The options of the forward, ``fwd``, or of the backward, ``bwd``."""
    return {name: value for name, value in options.items() if name.startswith(f"{prefix}_")}


def describe_options(options: dict[str, int]) -> str:
    """Tiles; stages and warps of both directions in a few words."""
    words = []
    for direction, prefix in (("forward", "fwd"), ("backward", "bwd")):
        *sizes, stages, warps = one_direction(options, prefix).values()
        words.append(f"{direction} {', '.join(map(str, sizes))}; {stages}, {warps}")
    return " and ".join(words)


def all_that_fit(widths: Widths, shared_memory: int) -> tuple[list[Forward], list[Backward]]:
    """Every choice worth timing on a device with this much shared memory."""
    sizes, stages, warps = (32, 64, 128), (1, 2, 3, 4), (4, 8)
    forward = [Forward(*choice) for choice in product(sizes, sizes, stages, warps)]
    backward = [
        Backward(*choice)
        for choice in product(sizes, sizes, sizes, sizes, (1, 2, 3), (8,))
        if choice[1] % choice[0] == choice[2] % choice[3] == 0
    ]
    return (
        [choice for choice in forward if choice.shared_memory(widths) <= shared_memory],
        [choice for choice in backward if choice.shared_memory(widths) <= shared_memory],
    )


def _choices(widths: Widths, major: int) -> tuple[tuple[Forward, ...], tuple[Backward, ...]]:
    """Tiles in order of preference."""
    if widths.bytes > 2:
        return _FORWARD_FLOAT32, _BACKWARD_FLOAT32
    if major not in _FORWARD_FIRST:
        return _FORWARD, _BACKWARD
    return (_FORWARD_FIRST[major], *_FORWARD), (_BACKWARD_FIRST[major], *_BACKWARD)


def _first_that_fits[Tiles: (Forward, Backward)](
    choices: tuple[Tiles, ...], widths: Widths, shared_memory: int
) -> Tiles | None:
    fitting = (choice for choice in choices if choice.shared_memory(widths) <= shared_memory)
    return next(fitting, None)


def _power_of_two(width: int) -> int:
    """Triton's tiles are powers of two wide, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())
