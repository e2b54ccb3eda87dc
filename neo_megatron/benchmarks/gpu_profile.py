"""Profiles a step on the GPU: shares of time by kind of kernel, and of idle time."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

# The first pattern that matches a kernel's name counts. Inductor names a fused kernel after the operations in it.
KINDS = {
    "copies": r"^memcpy|^memset|copybuffer|direct_copy|unrolled_elementwise.*copy|catarray|multi_tensor.*copy",
    "attention": r"flex_attention|flash_|fmha|triton_tem_fused.*(?:flex|zeros)|sdpa|flashattn|block_mask",
    "optimizer": r"adam|multi_tensor|multitensor|l2norm|lpnorm|clip_grad|chunked_scale",
    "cross entropy": r"softmax|nll_loss|cross_entropy|logsumexp|log_softmax|_ce_|online_ce",
    "FP8 casts": r"cast_transpose|quantize|amax|fp8|float8|delayed_scaling|blockwise.*(?:cast|transpose)",
    "products": r"gemm|nvjet|cutlass|cublas|wgmma|xmma|splitk|cutlass3x|tensorop|dot_kernel",
    "norm, rotary": r"rmsnorm|rms_norm|layernorm|layer_norm|rsqrt|rotary|rope|_norm_|ln_fwd|ln_bwd|_cos_|_sin_",
    "SwiGLU": r"silu|swiglu|gated_act|geglu",
}
# Calls of the host that end when the GPU has done what they wait for; not those of `torch.cuda.synchronize`, which
# begin and end a measurement.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
OTHER, IDLE = "all else", "idle"


def kind_of(kernel: str) -> str:
    """The kind of a kernel, from its name: a key of `KINDS`, "products" or `OTHER`."""
    name = kernel.lower()
    if re.search(r"gemm|nvjet|xmma", name) and "fmha" not in name:  # FP8 products have fp8 in their names
        return "products"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of (start, end): streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def share_by_kind(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """(name, start, end) of kernels -> share of the time from the first start to the last end, by kind.

    Kernels that run in parallel to others count in their kinds as well, so that the shares may add up to more than one.
    """
    kernels = list(kernels)
    span = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
    kinds: dict[str, float] = {}
    for name, start, end in kernels:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + (end - start) / span
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return ordered | {IDLE: 1 - busy((start, end) for _, start, end in kernels) / span}


@dataclass
class Measured:
    """Filled when the profile ends.

    Attributes:
        kinds: shares of time.
        waits: how often the host called each of `WAITS`.
    """

    kinds: dict[str, float] = field(default_factory=dict)
    waits: Counter[str] = field(default_factory=Counter)


@contextmanager
def profiled() -> Iterator[Measured]:
    """Profiles the GPU during the block; the profiler slows the host, so that idle time is an upper bound."""
    measured = Measured()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield measured
    events = profiler.events()
    measured.waits = Counter(event.name for event in events if event.name in WAITS)
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        # Annotations of regions stand next to the kernels in them.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    if kernels:
        measured.kinds = share_by_kind(kernels)
