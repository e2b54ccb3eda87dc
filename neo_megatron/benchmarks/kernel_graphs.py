"""Compiles the functions that a GPU runs under `torch.compile`, for an architecture, without a GPU.

    python -m neo_megatron.benchmarks.kernel_graphs < CASES.jsonl

A process of its own: importing this module changes PyTorch's view of the machine. Dynamo and AOTAutograd trace on CPU
tensors; both graphs are then moved to fake tensors of the device and given to Inductor, as on a GPU. A line of JSON in
is an `AttentionCase`; a line out its kernels in the order of compilation and the modules that Inductor wrote.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

from neo_megatron.megatron_compat import absent_gpu  # first: sets variables that PyTorch reads on import

GPU = absent_gpu.install()

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.benchmarks.kernel_binaries import DEVICES, Binary, Device
from neo_megatron.benchmarks.kernel_cases import AttentionCase
from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.flex_kernel import FLEX_BLOCK
from neo_megatron.model.mask import AttentionRule


def compile_attention(case: AttentionCase) -> dict[str, Any]:
    """Kernels of FlexAttention's forward and backward for a case, as `Binary` fields, and the modules they are in."""
    kernels: list[Binary] = []
    modules: list[str] = []
    GPU.use(properties_of(DEVICES[case.architecture]))
    GPU.kernels = lambda kernel: kernels.append(Binary.of(kernel))
    GPU.modules = modules.append
    backend = aot_autograd(
        fw_compiler=partial(_lower, backward=False),
        bw_compiler=partial(_lower, backward=True),
        decompositions=select_decomp_table,
    )
    attention = torch.compile(flex_attention, dynamic=False, backend=backend)
    with fresh_cache(), FakeTensorMode(allow_non_fake_inputs=True):
        document = torch.zeros(case.packs, case.keys, dtype=torch.int32)
        rows = None if case.queries == case.keys else torch.arange(case.queries)
        blocks = SeenKeys.of(AttentionRule(document, document - 1, rows)).blocks(case.keys, FLEX_BLOCK)
        query, key, value = (
            torch.empty(length, case.packs, heads, width, dtype=getattr(torch, case.dtype), requires_grad=True)
            for length, heads, width in (
                (case.queries, case.heads, case.query_key),
                (case.keys, case.groups, case.query_key),
                (case.keys, case.groups, case.value),
            )
        )
        attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            block_mask=blocks,
            scale=1 / math.sqrt(case.value),
            enable_gqa=True,
            kernel_options=case.options,
        ).sum().backward()
    return {"kernels": [asdict(kernel) for kernel in kernels], "modules": modules}


def properties_of(device: Device) -> SimpleNamespace:
    """As the driver of such a device states them, as far as anyone asks."""
    return SimpleNamespace(
        name=device.name,
        major=device.capability[0],
        minor=device.capability[1],
        total_memory=80 << 30,
        multi_processor_count=device.multiprocessors,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=device.shared,
        shared_memory_per_multiprocessor=device.shared + 1024,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=device.threads,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )


def _lower(graph: torch.fx.GraphModule, inputs: Sequence[Any], backward: bool) -> Callable[..., Any]:
    device = torch.device("cuda", 0)
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": device}
            module.recompile()
    with GPU.seen():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            moved = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x
                for x in inputs
            ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
        with tracing(TracingContext(mode)):
            compile_fx_inner(graph, moved, is_backward=backward)
    return make_boxed_func(graph)


def main() -> None:
    """Compiles a case for each line of standard input."""
    for line in sys.stdin:
        print(json.dumps(compile_attention(AttentionCase(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
