"""A row of a benchmark's table: our figure, the baseline of the same run, and their ratio."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        what: measured, with its setting.
        unit: of ``ours`` and ``floor``; the ratio is ours / floor.
        ours: our figure.
        floor: the baseline: the same work without our code, or the figure of another program; ``None`` without one.
        floor_name: what ``floor`` is.
        target: the target, as text.
    """

    what: str
    unit: str
    ours: float
    floor: float | None = None
    floor_name: str = ""
    target: str = ""


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads, system calls included, for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def side_by_side(works: Sequence[Callable[[], object]], repeats: int = 5) -> list[float]:
    """Median CPU seconds of each piece of work; they take turns, so that a slow minute hits all of them alike."""
    times = [[cpu_seconds(work) for work in works] for _ in range(repeats)]
    return [median(column) for column in zip(*times, strict=True)]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table that can be pasted into ``docs/benchmarks.md``."""
    lines = ["| what | ours | held against | ratio | target |", "|---|---|---|---|---|"]
    for row in rows:
        floor = "" if row.floor is None else f"{_number(row.floor)} ({row.floor_name})"
        ratio = "" if row.floor is None else f"{row.ours / row.floor:.2f}"
        lines.append(f"| {row.what} | {_number(row.ours)} {row.unit} | {floor} | {ratio} | {row.target} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
