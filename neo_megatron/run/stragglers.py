"""Names a rank that is slower than the others, without making any rank wait.

All ranks take as long for a step as the slowest one. Which one that is can be seen in the time that a rank needs for
itself: here, waiting for its packs, by the clock of the host, and the forward passes, on a GPU between two events that
are read once they have passed. Nothing of either waits for data-parallel ranks or other pipeline stages; ranks that
share a layer wait for one another in it, and are slow together. Megatron's own detector, `--log-straggler`, waits for
the GPU and for all ranks, needs NVIDIA's management library, and names the slowest rank of every run.

Every `STEPS` steps the ranks put the median of their own times into the store of the process group, which does not
block, and the last one, which logs, compares them in a later step, when all are there.
"""

import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any, Protocol

import torch

from neo_megatron.megatron_compat import cpu_platform

STEPS = 100
RATIO = 1.2  # a rank over so many times the median is named
SCALAR = "performance/slowest rank over median"


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass
class _Step:
    """Own seconds of this rank in a step."""

    forward: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class OwnTime:
    """Of a rank, in the median over the steps that end with `step`.

    Args:
        stage: pipeline stage; ranks of another one have other work.
        forward, waiting: seconds in a step, in the forward passes and waiting for packs.
        who: process and machine.
    """

    rank: int
    step: int
    stage: int
    forward: float
    waiting: float
    who: str

    @property
    def seconds(self) -> float:
        return self.forward + self.waiting


class Stragglers:
    """Own times of this process.

    Args:
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._step = _Step()
        self._steps: list[_Step] = []  # since a multiple of `STEPS`
        self._passes: deque[tuple[_Step, torch.cuda.Event, torch.cuda.Event]] = deque()  # not read yet
        self._measured: tuple[int, list[_Step]] | None = None  # until it can be told
        self._awaited = 0  # the step whose times are not all there

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures what is done inside as waiting for packs."""
        begun = time.perf_counter()
        yield
        if torch.is_grad_enabled():
            self._step.waiting += time.perf_counter() - begun

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measures what is done inside as a forward pass."""
        if not torch.is_grad_enabled():
            yield
        elif cpu_platform.on_cpu():
            begun = time.perf_counter()
            yield
            self._step.forward += time.perf_counter() - begun
        else:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self._passes.append((self._step, *events))

    def end_step(self, number: int, stage: int, store: Store | None) -> list[OwnTime]:
        """Ends a step.

        Args:
            number: of the step.
            stage: pipeline stage of this rank.
            store: of the process group; ``None`` for a run of one rank.

        Returns:
            On the last rank, once it is known, the own time of all ranks; else nothing.
        """
        self._steps.append(self._step)
        self._step = _Step()
        while self._passes and self._passes[0][2].query():
            step, begin, end = self._passes.popleft()
            step.forward += begin.elapsed_time(end) / 1e3
        if number % STEPS == 0:
            if len(self._steps) == STEPS:
                self._measured = number, self._steps
            self._steps = []
        if store is None:
            return []
        if self._measured and not (self._passes and any(self._passes[0][0] is step for step in self._measured[1])):
            self._tell(store, stage, *self._measured)
            self._awaited, self._measured = self._measured[0], None
        return self._compare(store) if self._awaited and self._rank == self._ranks - 1 else []

    def _tell(self, store: Store, stage: int, number: int, steps: list[_Step]) -> None:
        middle = median_low((step.forward + step.waiting, step.forward, step.waiting) for step in steps)
        who = f"process {os.getpid()} on {socket.gethostname()}"
        own = OwnTime(self._rank, number, stage, *middle[1:], who)
        store.set(_key(self._rank), json.dumps(asdict(own)))

    def _compare(self, store: Store) -> list[OwnTime]:
        keys = [_key(rank) for rank in range(self._ranks)]
        if not store.check(keys):
            return []
        times = [OwnTime(**json.loads(text)) for text in store.multi_get(keys)]
        if any(own.step != self._awaited for own in times):
            return []
        self._awaited = 0
        return times


def _key(rank: int) -> str:
    return f"neo_megatron/own-time/{rank}"


def default_store() -> Any:
    """The store of the process group; ``None`` for one rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def compare(times: list[OwnTime]) -> tuple[Mapping[str, float], str]:
    """Ranks of one pipeline stage with one another.

    The median of an even number of ranks is the lower one: that of two ranks is the faster one.

    Returns:
        The scalar to log, and the sentence that names the slowest rank; empty if it is not over `RATIO` times the
        median. Nothing to log where each stage has one rank.
    """
    ratios: list[tuple[float, OwnTime, float, int]] = []
    for stage in sorted({own.stage for own in times}):
        of_stage = [own for own in times if own.stage == stage]
        middle = median_low(own.seconds for own in of_stage)
        if len(of_stage) > 1 and middle:
            ratios += [(own.seconds / middle, own, middle, len(of_stage)) for own in of_stage]
    if not ratios:
        return {}, ""
    ratio, slowest, middle, ranks = max(ratios, key=lambda it: it[0])
    scalars = {SCALAR: ratio}
    if ratio <= RATIO:
        return scalars, ""
    further = sum(it[0] > RATIO for it in ratios) - 1
    return scalars, (
        f"steps {slowest.step - STEPS + 1} to {slowest.step}: rank {slowest.rank} ({slowest.who}) is slow: {ratio:.2f} "
        f"times the median of the {ranks} ranks that do the same; {1e3 * slowest.seconds:.0f} ms a step (forward "
        f"{1e3 * slowest.forward:.0f}, waiting for packs {1e3 * slowest.waiting:.0f}) against {1e3 * middle:.0f}"
        + (f"; {further} more ranks are over {RATIO} times" if further else "")
    )
