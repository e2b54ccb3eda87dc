"""Times kernels on the device that there is."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from neo_megatron.benchmarks.gpu_window import synchronise

Report = Callable[[dict[str, Any]], None]

WARM_UP, REPEATS = 3, 10
PACKED, CAUSAL = "packed, with images", "one causal document"


def kernel_seconds(work: Callable[[], object]) -> float:
    """Median seconds of a call on the GPU, by events; on a CPU by the clock."""
    for _ in range(WARM_UP):
        work()
    synchronise()
    times = []
    for _ in range(REPEATS):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return median(times)


def device_and_dtype() -> tuple[str, torch.dtype]:
    """The device to measure on, and the dtype to compute in there."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
