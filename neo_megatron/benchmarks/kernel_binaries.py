"""Registers, spilled bytes and shared memory of Triton kernels, read from their machine code.

Triton's wheel brings NVIDIA's assembler, so that a kernel is compiled for any architecture without a GPU or a driver.
"""

import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU that stands for its architecture.

    Args:
        capability: such as (9, 0).
        shared: bytes of shared memory that one block of threads may have (CUDA C++ Programming Guide, table of compute
            capabilities).
        threads: that a multiprocessor holds at most.
    """

    name: str
    capability: tuple[int, int]
    shared: int
    multiprocessors: int
    threads: int = 2048

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


DEVICES = {
    f"{device.capability[0]}.{device.capability[1]}": device
    for device in (
        Device("NVIDIA A100-SXM4-80GB", (8, 0), 163 * KIB, 108),
        Device("NVIDIA L40S", (8, 9), 99 * KIB, 142, threads=1536),
        Device("NVIDIA H100 80GB HBM3", (9, 0), 227 * KIB, 132),
        Device("NVIDIA B200", (10, 0), 227 * KIB, 148),
        Device("NVIDIA GeForce RTX 5090", (12, 0), 99 * KIB, 170, threads=1536),
    )
}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: registers and spilled bytes of each thread, bytes of shared memory of a block."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int

    @classmethod
    def of(cls, kernel: Any) -> "Binary":
        """From what `triton.compile` returns. All of a thread's local memory counts as spilled."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "kernel.cubin"
            file.write_bytes(kernel.asm["cubin"])
            command = [Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump", "-res-usage", file]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # The last line: "REG:148 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1100 TEXTURE:0 ..."
        usage = dict(part.split(":") for part in printed.strip().splitlines()[-1].split())
        metadata = kernel.metadata
        spilled = int(usage["STACK"]) + int(usage["LOCAL"])
        return cls(metadata.name, int(usage["REG"]), spilled, metadata.shared, metadata.num_warps, metadata.num_stages)


def compile_kernel(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: str,
    num_warps: int = 4,
    num_stages: int = 3,
    multiples_of_16: Iterable[str] = (),
) -> Binary:
    """Compiles a function under `triton.jit` for an architecture, to machine code.

    Args:
        signature: type of each parameter that is not a constant, such as ``{"x": "*bf16", "rows": "i32"}``. Pointers
            are taken as multiples of 16 bytes, as PyTorch's memory is.
        constants: values of the parameters that are `tl.constexpr`.
        architecture: a key of `DEVICES`.
        multiples_of_16: parameters that are integers and always multiples of 16.

    Raises:
        triton.errors.TritonError, RuntimeError: the kernel does not compile.
    """
    names = function.arg_names
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | set(multiples_of_16)
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    with tempfile.TemporaryDirectory() as directory, triton.knobs.cache.scope():
        triton.knobs.cache.dir = directory
        return Binary.of(triton.compile(source, DEVICES[architecture].target, options))
