"""Registers, spills and shared memory of attention's kernels: `neo-megatron benchmark kernels`, without a GPU."""

import sys
from collections.abc import Sequence

from neo_megatron.benchmarks.kernel_binaries import DEVICES, KIB
from neo_megatron.benchmarks.kernel_cases import attention_case, compiled

# Query or key, and value channels of a head: NEO-2B and 9B, SenseNova-U1, the tiny model of the tests.
WIDTHS = ((256, 128), (128, 128), (32, 16))
CASES = [
    *(
        attention_case(architecture, widths, dtype)
        for architecture in DEVICES
        for widths in WIDTHS
        for dtype in ("bfloat16", "float32")
    ),
    # A rank of eight under --cp-comm-type allgather, of a pack of 128k.
    *(attention_case(architecture, (256, 128), lengths=(16384, 131072)) for architecture in DEVICES),
]
# Bytes of a thread that a kernel may spill: (architecture, channels of a key, dtype, direction). On sm_100 tiles that
# spill nothing hold half as many queries and keys, so that twice the bytes are loaded. float32 is for references only.
ACCEPTED_SPILLS = {
    ("10.0", 256, "bfloat16", "backward"): 16,
    **{(architecture, 256, "float32", "backward"): 8 for architecture in ("8.0", "8.9", "12.0")},
    ("9.0", 128, "float32", "forward"): 208,
    ("10.0", 128, "float32", "forward"): 248,
    ("12.0", 128, "float32", "forward"): 248,
    ("12.0", 128, "float32", "backward"): 8,
    **{(architecture, 32, "float32", "backward"): 16 for architecture in ("8.0", "8.9")},
}
PREFIX = {"forward": "fwd", "backward": "bwd"}
TILES = {"forward": ("BLOCK_M", "BLOCK_N"), "backward": ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}


def measure(architectures: Sequence[str]) -> str:
    """Tiles, registers, spilled bytes of a thread and shared memory of each case's kernels, as Markdown.

    Args:
        architectures: keys of `DEVICES`.
    """
    cases = [case for case in CASES if case.architecture in architectures]
    lines = [
        "| sm | heads | dtype | queries x keys | kernel | tiles | stages, warps | registers | spilled | shared, KiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, kernels in zip(cases, compiled(cases), strict=True):
        limit = DEVICES[case.architecture].shared // KIB
        for direction, sizes in TILES.items():
            binary = getattr(kernels, direction)
            tiles = ", ".join(str(case.options[f"{PREFIX[direction]}_{size}"]) for size in sizes)
            lines.append(
                f"| {case.architecture} | {case.query_key}, {case.value} | {case.dtype} | {case.queries} x {case.keys} "
                f"| {direction} | {tiles} | {binary.stages}, {binary.warps} | {binary.registers} | {binary.spilled} "
                f"| {binary.shared / KIB:.0f} of {limit} |"
            )
        print(lines[-2], lines[-1], sep="\n", file=sys.stderr, flush=True)
    return "\n".join(lines)
