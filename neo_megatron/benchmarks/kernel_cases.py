"""The kernels of a GPU run, by model and device, and a process that compiles them without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from neo_megatron.benchmarks.kernel_binaries import DEVICES, Binary
from neo_megatron.errors import ConfigError
from neo_megatron.model.flex_kernel import Widths, kernel_options


@dataclass(frozen=True)
class AttentionCase:
    """Shapes and tiles of an attention kernel.

    Args:
        architecture: a key of `DEVICES`.
        query_key, value: channels of a head.
        queries: of this rank; fewer than ``keys`` under `--cp-comm-type allgather`.
        options: `kernel_options` of FlexAttention.
    """

    architecture: str
    query_key: int
    value: int
    heads: int
    groups: int
    queries: int
    keys: int
    dtype: str
    options: dict[str, int]
    packs: int = 1


@dataclass(frozen=True)
class AttentionKernels:
    """Compiled kernels of a case, and the modules of Inductor that call them, as Python source."""

    forward: Binary
    backward: Binary
    modules: tuple[str, str]
    others: tuple[Binary, ...]


def attention_case(
    architecture: str,
    widths: tuple[int, int],
    dtype: str = "bfloat16",
    heads: tuple[int, int] = (16, 8),
    lengths: tuple[int, int] = (8192, 8192),
    packs: int = 1,
    options: dict[str, int] | None = None,
) -> AttentionCase:
    """A case in the tiles that a run would choose for it on such a device.

    Args:
        widths: of query or key, and of value.
        heads: of queries, and of keys and values.
        lengths: of queries and keys.
        options: other tiles.

    Raises:
        ConfigError: none fit.
    """
    device = DEVICES[architecture]
    bytes_of_number = {"bfloat16": 2, "float32": 4}[dtype]
    options = options or kernel_options(Widths(*widths, bytes_of_number), device.capability, device.shared)
    if options is None:
        raise ConfigError(f"{device.name} cannot hold a tile of heads of {widths} in {dtype}; attention runs in SDPA")
    return AttentionCase(architecture, *widths, *heads, *lengths, dtype, options, packs)


def compiled(cases: Iterable[AttentionCase]) -> Iterator[AttentionKernels]:
    """The kernels of each case, compiled one after another in a process without a GPU.

    Raises:
        RuntimeError: a case does not compile; what the process printed has the reason.
    """
    cases = list(cases)
    process = subprocess.Popen(
        [sys.executable, "-m", "neo_megatron.benchmarks.kernel_graphs"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    with process:
        for case in cases:
            process.stdin.write(json.dumps(asdict(case)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{case} does not compile: see the messages above")
            yield _sorted(json.loads(line))
        process.stdin.close()


def _sorted(compiled: dict[str, Any]) -> AttentionKernels:
    kernels = [Binary(**fields) for fields in compiled["kernels"]]
    attention = [kernel for kernel in kernels if kernel.name.startswith("triton_tem")]
    others = [kernel for kernel in kernels if kernel not in attention]
    forward, backward = attention
    module, module_of_backward = compiled["modules"]
    return AttentionKernels(forward, backward, (module, module_of_backward), tuple(others))
