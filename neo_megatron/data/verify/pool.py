"""Runs the checks of a data set in this process or in a pool of processes, with results in the order of the tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children
from typing import Any

from tqdm import tqdm

from neo_megatron.errors import DataError
from neo_megatron.processes import SPAWN, StoppedWorkers

Check = Callable[..., list[Any]]
_STEP = 1 << 20  # bytes after which a worker reports its progress; taking the lock each time would cost more


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
    done = SPAWN.Value("q", 0)
    waiting: deque[Future[list[Any]]] = deque()
    others = set(active_children())
    stopped = StoppedWorkers()
    pool = ProcessPoolExecutor(workers, SPAWN, _start_worker, (done,))
    try:
        for task in tasks:
            waiting.append(pool.submit(_run, check, task))
            if len(waiting) >= 2 * workers:
                yield _await(waiting.popleft(), bar, done, stopped)
        while waiting:
            yield _await(waiting.popleft(), bar, done, stopped)
    except BrokenProcessPool as error:
        raise DataError("a worker was killed, probably out of memory; run again with fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(active_children()) - others:
            process.kill()  # in the middle of a check that nobody waits for


def _await(future: "Future[list[Any]]", bar: tqdm, done: Any, stopped: StoppedWorkers) -> list[Any]:
    while not future.done():
        wait([future], timeout=0.5)
        stopped.look(process.pid for process in active_children())
        bar.update(done.value - bar.n)
    bar.update(done.value - bar.n)
    return future.result()


_done: Any  # the counter of bytes, in a process of the pool


def _start_worker(done: Any) -> None:
    global _done
    _done = done


def _run(check: Check, task: tuple[Any, ...]) -> list[Any]:
    pending = 0

    def report(count: int) -> None:
        nonlocal pending
        pending += count
        if pending >= _STEP:
            flush()

    def flush() -> None:
        nonlocal pending
        with _done.get_lock():
            _done.value += pending
        pending = 0

    result = check(*task, report)
    flush()
    return result
