"""The slowest rank is named when it is slow for a hundred steps, and no rank waits for that."""

import re

import pytest
import torch
from torch.distributed import HashStore

from neo_megatron.run import stragglers
from neo_megatron.run.stragglers import SCALAR, Stragglers, compare


class Clock:
    """Stands for the clock of all ranks, which work one after the other."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stragglers, "time", clock)
    return clock


class Run:
    """Ranks of a run with a store; what the last one compares.

    Args:
        stages: the pipeline stage of each rank.
    """

    def __init__(self, clock: Clock, stages: list[int]) -> None:
        self.clock, self.stages, self.store = clock, stages, HashStore()
        self.ranks = [Stragglers(rank, len(stages)) for rank in range(len(stages))]
        self.told: list[tuple[int, dict[str, float], str]] = []

    def step(self, number: int, forward: list[float], waiting: list[float] | None = None) -> None:
        """A step of two micro-batches, in which the last rank is the first to end."""
        for rank, detector in reversed(list(enumerate(self.ranks))):
            for _ in range(2):
                with detector.waiting():
                    self.clock.seconds += waiting[rank] / 2 if waiting else 0
                with detector.forward():
                    self.clock.seconds += forward[rank] / 2
                with torch.no_grad(), detector.waiting(), detector.forward():  # an evaluation
                    self.clock.seconds += 1000
            if times := detector.end_step(number, self.stages[rank], self.store):
                self.told.append((number, *compare(times)))


def test_a_rank_that_is_slow_for_a_hundred_steps_is_named(clock):
    run = Run(clock, [0, 0, 0, 0])
    for number in range(1, 302):
        slow = 101 <= number <= 200
        run.step(number, [0.5, 0.5, 0.7 if slow else 0.5, 0.52], [0.1, 0.1, 0.2 if slow else 0.1, 0.1])
    # The last rank is ahead of the others by less than a step.
    assert [number for number, _, _ in run.told] == [101, 201, 301]
    assert [scalars[SCALAR] for _, scalars, _ in run.told] == pytest.approx([0.62 / 0.6, 1.5, 0.62 / 0.6])
    assert [sentence for _, _, sentence in run.told][::2] == ["", ""]
    assert re.fullmatch(
        r"steps 101 to 200: rank 2 \(process \d+ on \S+\) is slow: 1\.50 times the median of the 4 ranks that do the "
        r"same; 900 ms a step \(forward 700, waiting for packs 200\) against 600",
        run.told[1][2],
    )


def test_a_pause_and_packs_of_unequal_size_name_nobody(clock):
    run = Run(clock, [0, 0])
    for number in range(1, 102):
        run.step(number, [1 + number % 3, 1 + (number + 1) % 3 + (500 if number in (7, 50) else 0)])
    assert len(run.told) == 1 and run.told[0][2] == ""


def test_pipeline_stages_have_other_work(clock):
    run = Run(clock, [0, 0, 1, 1])
    for number in range(1, 102):
        run.step(number, [1, 1, 3, 3.3])
    assert run.told[0][1:] == ({SCALAR: pytest.approx(1.1)}, "")


def test_all_ranks_of_a_slow_group_are_counted(clock):
    run = Run(clock, [0] * 8)
    for number in range(1, 102):
        run.step(number, [1, 1, 1, 1, 1, 1.5, 1.6, 1.55])
    assert "rank 6 " in run.told[0][2]
    assert run.told[0][2].endswith("; 2 more ranks are over 1.2 times")


def test_ranks_with_nobody_to_compare_with_say_nothing(clock):
    run = Run(clock, [0, 1])
    for number in range(1, 102):
        run.step(number, [1, 2])
    assert [it[1:] for it in run.told] == [({}, "")]


def test_a_hundred_steps_are_counted_from_a_multiple_after_a_resume(clock):
    run = Run(clock, [0, 0])
    for number in range(151, 302):
        run.step(number, [1, 2])
    assert [number for number, _, _ in run.told] == [301]
    assert run.told[0][2].startswith("steps 201 to 300: rank 1 ")


def test_one_rank_has_nothing_to_tell(clock):
    alone = Stragglers(0, 1)
    for number in range(1, 202):
        with alone.forward():
            clock.seconds += 1
        assert alone.end_step(number, 0, None) == []


class Event:
    """As of CUDA: its time is known some time after it was recorded."""

    now, passed = 0.0, 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.passed

    def elapsed_time(self, end: "Event") -> float:
        assert end.query()
        return 1e3 * (end.at - self.at)


def test_events_of_a_gpu_are_read_when_they_have_passed(clock, monkeypatch):
    monkeypatch.setattr(stragglers.cpu_platform, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    store, ranks, told = HashStore(), [Stragglers(rank, 2) for rank in range(2)], []
    for number in range(1, 104):
        for rank, detector in enumerate(ranks):
            for _ in range(3):
                with detector.forward():
                    Event.now += 1 + rank
            Event.passed = Event.now - 10  # the host is a step ahead: 3 x 3 seconds, and a little
            if times := detector.end_step(number, 0, store):
                told.append((number, [own.forward for own in times]))
    assert [times for _, times in told] == [[3.0, 6.0]] and 100 < told[0][0] <= 103
