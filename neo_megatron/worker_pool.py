"""A pool of worker processes, and results in the order of their items."""

import contextlib
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from neo_megatron.errors import NeoError
from neo_megatron.processes import SPAWN, StoppedWorkers

_WINDOW = 4  # items in flight per worker, which bounds the memory of results that wait for an earlier one


class Executor(Protocol):
    """Runs items, several at a time.

    Attributes:
        workers: number of items that run at the same time.
    """

    workers: int

    def start(self, number: int, item: Any) -> None:
        """Starts an item; called while fewer than ``workers`` are running."""

    def wait(self) -> tuple[int, Any]:
        """Waits for any item to end; returns its number and its result, or the exception that it raised."""

    def close(self) -> None:
        """Stops all workers, even in the middle of an item."""


def in_order(executor: Executor, items: Iterable[Any]) -> Iterator[Any]:
    """Runs items and yields their results in the order of the items; the first exception in that order is raised."""
    waiting = enumerate(items)
    started: deque[int] = deque()
    results: dict[int, Any] = {}
    while True:
        while len(started) - len(results) < executor.workers and len(started) < _WINDOW * executor.workers:
            if (entry := next(waiting, None)) is None:
                break
            executor.start(*entry)
            started.append(entry[0])
        if not started:
            return
        number, result = executor.wait()
        results[number] = result
        while started and started[0] in results:
            result = results.pop(started.popleft())
            if isinstance(result, Exception):
                raise result
            yield result


class WorkerDied(Exception):
    """A worker ended in the middle of an item.

    Attributes:
        item: that it worked on.
        how: it ended, such as "by SIGKILL".
    """

    def __init__(self, item: Any, how: str) -> None:
        super().__init__(how)
        self.item, self.how = item, how


class WorkerPool:
    """An `Executor` of spawned processes, each at the other end of a pipe.

    Args:
        workers: number of processes.
        prepare: is called in each process as ``prepare(argument, report)`` and returns the function of an item.
        argument: is sent to each process once.
        report: is called in this process with the values of each call of ``report`` in a worker.

    Raises:
        WorkerDied: from `wait`.
    """

    def __init__(
        self, workers: int, prepare: Callable[..., Callable[[Any], Any]], argument: Any, report: Callable[..., Any]
    ) -> None:
        self.workers = workers
        self._report = report
        self._idle: list[tuple[SpawnProcess, connection.Connection]] = []
        self._busy: dict[connection.Connection, tuple[SpawnProcess, int, Any]] = {}
        self._stopped = StoppedWorkers()
        for _ in range(workers):
            ours, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=_serve, args=(prepare, argument, theirs), daemon=True)
            process.start()
            theirs.close()
            self._idle.append((process, ours))

    def start(self, number: int, item: Any) -> None:
        """Sends an item to an idle worker."""
        process, pipe = self._idle.pop()
        self._busy[pipe] = process, number, item
        with contextlib.suppress(ConnectionError):  # the worker died while it was idle, which `wait` finds
            pipe.send(item)

    def wait(self) -> tuple[int, Any]:
        """Waits for any item to end; returns its number and its result, or the exception that it raised."""
        while True:
            ready: list[Any] = connection.wait(list(self._busy), timeout=1.0)
            if not ready:
                self._stopped.look(process.pid for process, _, _ in self._busy.values())
            for pipe in ready:
                process, number, item = self._busy[pipe]
                try:
                    has_ended, values = pipe.recv()
                except (EOFError, ConnectionError) as error:
                    process.join()
                    raise WorkerDied(item, _ending(process.exitcode)) from error
                if has_ended:
                    del self._busy[pipe]
                    self._idle.append((process, pipe))
                    return number, values
                self._report(*values)

    def close(self) -> None:
        """Kills all workers."""
        processes = [process for process, _ in self._idle] + [process for process, _, _ in self._busy.values()]
        for process in processes:
            process.kill()  # in the middle of whatever it does: an unfinished item does not count
        for process in processes:
            process.join()


def _serve(prepare: Callable[..., Callable[[Any], Any]], argument: Any, pipe: connection.Connection) -> None:
    """Runs a worker until the other end of the pipe is gone; sends (whether an item has ended, values)."""
    with contextlib.suppress(EOFError, ConnectionError):
        work = prepare(argument, lambda *values: pipe.send((False, values)))
        while True:
            pipe.send((True, _attempt(work, pipe.recv())))


def _attempt(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except ConnectionError:  # the other end of the pipe is gone
        raise
    except Exception as error:
        if not isinstance(error, NeoError):  # a bug, whose traceback pickling would drop
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        return error


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"by {signal.Signals(-exitcode).name}"
    return f"with exit code {exitcode}"
