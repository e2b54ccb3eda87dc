"""Runs the checks of a data set in this process or in a pool of processes, with results in the order of the tasks."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from neo_megatron.errors import DataError
from neo_megatron.worker_pool import WorkerDied, WorkerPool, in_order

Check = Callable[..., list[Any]]
_STEP = 1 << 20  # bytes after which a worker reports its progress


def run_checks(check: Check, tasks: Iterable[tuple[Any, ...]], workers: int, bar: tqdm) -> Iterator[list[Any]]:
    """Yields ``check(*task, report)`` of each task, in order; ``report(bytes)`` advances the bar.

    Args:
        check: a function that can be pickled.
        tasks: its arguments.
        workers: processes; with 1, this process.
        bar: the progress bar.

    Raises:
        DataError: a worker was killed.
    """
    if workers == 1:
        yield from (check(*task, bar.update) for task in tasks)
        return
    with contextlib.closing(WorkerPool(workers, _prepare, check, bar.update)) as pool:
        try:
            yield from in_order(pool, tasks)
        except WorkerDied as died:
            raise DataError(
                f"a worker died ({died.how}), probably out of memory; run again with fewer --workers"
            ) from died


def _prepare(check: Check, report: Callable[[int], Any]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """The check of a task, with reports joined to larger ones."""

    def run(task: tuple[Any, ...]) -> list[Any]:
        pending = 0

        def add(count: int) -> None:
            nonlocal pending
            pending += count
            if pending >= _STEP:
                report(pending)
                pending = 0

        result = check(*task, add)
        report(pending)
        return result

    return run
