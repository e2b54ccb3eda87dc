"""Measures a window of training steps over packs, after some warm-up steps."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from neo_megatron.benchmarks.gpu_packs import draw_packs
from neo_megatron.benchmarks.gpu_profile import profiled
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.flops import model_flops
from neo_megatron.planning.packs import measure_items

SEED = 1
WARM_UP = 3


@dataclass(frozen=True)
class Windows:
    """The packs of all windows.

    Args:
        lengths: tokens of a pack, a window each.
        steps: of a window; each uses a pack of its own.
        shrunk: see `draw_packs`.
        profiled: whether a few more steps at the end of each window are profiled.
    """

    sizes: NeoSizes
    training_stage: int
    lengths: tuple[int, ...]
    steps: int
    shrunk: int = 1
    profiled: bool = False

    def packs(self, length: int) -> list[dict[str, Any]]:
        return draw_packs(self.sizes, length, self.steps, SEED, self.shrunk)

    def only(self, length: int) -> "Windows":
        return replace(self, lengths=(length,))


class Meter:
    """Drives windows: `batches` yields what each step takes, and a step ends when the next one is asked for."""

    def __init__(self, windows: Windows, report: Callable[[dict[str, Any]], None]) -> None:
        self.windows, self.report = windows, report
        self.losses: list[Any] = []
        """Figures of all steps so far, filled by the training loop without synchronising."""

    def batches(self, form: Callable[[dict[str, Any]], Any]) -> Iterator[Any]:
        """The inputs of all steps, made in advance by `form` from collated packs; measures from step to step."""
        windows = self.windows
        for length in windows.lengths:
            packs = windows.packs(length)
            inputs = [form(pack) for pack in packs]
            for number in range(WARM_UP):
                yield inputs[number % len(inputs)]
            synchronise()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            yield from inputs
            synchronise()
            seconds = (time.perf_counter() - start) / len(inputs)
            kinds = waits = None
            if windows.profiled:
                with profiled() as measured:
                    yield from inputs[:2]
                    synchronise()
                kinds, waits = measured.kinds, measured.waits.total() / 2
            workload = measure_items(packs)
            flops = model_flops(windows.sizes, windows.training_stage, workload).total(windows.sizes)
            on_gpu = torch.cuda.is_available()
            self.report(
                {
                    "length": length,
                    "seconds": seconds,
                    "tokens": length,
                    "flops": flops.model * length,
                    "mean_keys": workload.mean_keys,
                    "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
                    "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
                    "loss": float(self.losses[-1]),
                    "kinds": kinds,
                    "waits": waits,
                }
            )


def synchronise() -> None:
    """Waits for the GPU; without one there is nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
