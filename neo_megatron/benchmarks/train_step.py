"""Settings and measurements that both sides of the training benchmark share."""

import time
from dataclasses import dataclass
from pathlib import Path

SEED = 1
BY_DATA_SET = "losses by data set and modality"
settings = {"lr": 1e-4, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "clip": 1.0}


@dataclass(frozen=True)
class Step:
    """One training step.

    Args:
        loss: of the pack, before the update.
        parts: CPU seconds, keyed by the name of the part; their sum is the step.
        memory: peak growth of the process in bytes, since before it built the model.
    """

    loss: float
    parts: dict[str, float]
    memory: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class Clock:
    """CPU seconds between the marks of a step, added up for each part."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.process_time()

    def mark(self, part: str) -> None:
        """Adds the time since the last mark to ``part``."""
        now = time.process_time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


class StopTraining(Exception):
    """The benchmark has seen enough steps."""


def grown() -> int:
    """The most memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
