"""Measures the rates that the machine's own kernels reach, and our attention next to them."""

from collections.abc import Sequence

import torch

from neo_megatron.benchmarks.gpu_timing import Report, device_and_dtype, kernel_seconds
from neo_megatron.model.config import NeoSizes


def prepare() -> None:
    """Imports what `run` needs, before the GPU is used."""
    from neo_megatron.megatron_compat import cpu_platform

    cpu_platform.install()
    from neo_megatron.benchmarks import gpu_attention  # noqa: F401


def run(report: Report, side: int, sizes: NeoSizes, lengths: Sequence[int], shrunk: int) -> None:
    """Reports the ceilings, to which everything is compared, and then attention kernels at each pack length."""
    from neo_megatron.benchmarks.gpu_attention import measure_attention

    measure_ceilings(report, side)
    for length in lengths:
        measure_attention(report, sizes, length, shrunk)


def measure_ceilings(report: Report, side: int) -> None:
    """Operations per second of a square product in bfloat16 (a CPU: float32), bytes per second of a copy on the device.

    A byte that is copied is read and written, and counts twice.
    """
    device, dtype = device_and_dtype()
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = kernel_seconds(lambda: torch.mm(left, right, out=out))
    memory = torch.empty(2, 2**28 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    copied = kernel_seconds(lambda: memory[0].copy_(memory[1]))
    figures = {"side": side, "product": 2 * side**3 / seconds, "copy": 2 * memory[0].numel() / copied}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = f"sm_{properties.major}{properties.minor}"
        figures |= {"name": properties.name, "capability": capability, "memory": properties.total_memory}
    report(figures)
