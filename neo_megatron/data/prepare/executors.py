"""Executors for annotation slices: in-process, a pool of local processes, or Ray.

An executor takes a slice when a worker is free, and returns outcomes as they complete; `in_order` puts them in order.
Workers write into the output directory, so an executor transfers little, and may run a slice twice.
"""

import contextlib
import os
import secrets
import signal
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, Literal, Protocol

from neo_megatron.data.prepare.annotation_slices import Slice
from neo_megatron.data.prepare.resume import Outcome
from neo_megatron.data.prepare.worker import SliceWorker, Task
from neo_megatron.errors import DataError
from neo_megatron.packages import install
from neo_megatron.processes import SPAWN, StoppedWorkers

ExecutorName = Literal["local", "ray"]
Report = Callable[[int, int], Any]  # as of SliceWorker
_Result = Outcome | DataError
# Slices in flight per worker, which bounds the memory.
_WINDOW = 4


class Executor(Protocol):
    """Runs slices, several at a time.

    Attributes:
        workers: slices that run at the same time.
    """

    workers: int

    def start(self, piece: Slice) -> None:
        """Starts a slice; called while fewer than ``workers`` are running."""

    def wait(self) -> tuple[int, _Result]:
        """The number of a slice that has ended, and its outcome or error.

        Raises:
            DataError: a worker died; the text names the slice that it worked on.
        """

    def close(self) -> None:
        """Stops all workers, even in the middle of a slice."""


def open_executor(name: ExecutorName, task: Task, workers: int, report: Report) -> Executor:
    """The executor of a name; one local worker is this process.

    Args:
        report: see `SliceWorker`.

    Raises:
        DataError: Ray is asked for and not installed.
    """
    if name == "ray":
        return RayExecutor(task, workers, report)
    return InlineExecutor(task, report) if workers == 1 else LocalExecutor(task, workers, report)


def in_order(executor: Executor, pieces: Iterator[Slice]) -> Iterator[Outcome]:
    """Runs slices and yields their outcomes in the order of the slices; the first error in that order is raised."""
    started: deque[int] = deque()
    results: dict[int, _Result] = {}
    while True:
        while len(started) - len(results) < executor.workers and len(started) < _WINDOW * executor.workers:
            piece = next(pieces, None)
            if piece is None:
                break
            executor.start(piece)
            started.append(piece.place.number)
        if not started:
            return
        number, result = executor.wait()
        results[number] = result
        while started and started[0] in results:
            result = results.pop(started.popleft())
            if isinstance(result, DataError):
                raise result
            yield result


class InlineExecutor:
    """Runs slices in this process, one after another."""

    workers = 1

    def __init__(self, task: Task, report: Report) -> None:
        self._worker = SliceWorker(task, report)
        self._piece: Slice | None = None

    def start(self, piece: Slice) -> None:
        self._piece = piece

    def wait(self) -> tuple[int, _Result]:
        return self._piece.place.number, _attempt(self._worker, self._piece)

    def close(self) -> None:
        pass


class LocalExecutor:
    """Runs slices in processes on this machine, each at the other end of a pipe."""

    def __init__(self, task: Task, workers: int, report: Report) -> None:
        self.workers = workers
        self._task = task
        self._report = report
        self._idle: list[tuple[Any, connection.Connection]] = []
        self._busy: dict[connection.Connection, tuple[Any, Slice]] = {}
        self._stopped = StoppedWorkers()
        for _ in range(workers):
            ours, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=_serve, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()
            self._idle.append((process, ours))

    def start(self, piece: Slice) -> None:
        process, pipe = self._idle.pop()
        self._busy[pipe] = process, piece
        with contextlib.suppress(ConnectionError):  # to a process that died idle; `wait` finds the pipe's end
            pipe.send(piece)

    def wait(self) -> tuple[int, _Result]:
        while True:
            ready: list[Any] = connection.wait(list(self._busy), timeout=1.0)
            if not ready:
                self._stopped.look(process.pid for process, _ in self._busy.values())
            for pipe in ready:
                process, piece = self._busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionError) as error:
                    process.join()
                    raise _died(self._task, piece, _ending(process.exitcode)) from error
                if isinstance(message, tuple):
                    self._report(*message)
                else:
                    del self._busy[pipe]
                    self._idle.append((process, pipe))
                    return piece.place.number, message

    def close(self) -> None:
        processes = [process for process, _ in [*self._idle, *self._busy.values()]]
        for process in processes:
            process.kill()  # in the middle of whatever it does: an unfinished slice does not count
        for process in processes:
            process.join()


def _serve(task: Task, pipe: connection.Connection) -> None:
    """Runs one process of the pool, until the other end of the pipe is gone."""
    try:
        worker = SliceWorker(task, lambda samples, size: pipe.send((samples, size)))
        while True:
            pipe.send(_attempt(worker, pipe.recv()))
    except (EOFError, ConnectionError):
        return


class RayExecutor:
    """Runs slices on a Ray cluster: that of ``RAY_ADDRESS``, else that of this machine, else one started here."""

    def __init__(self, task: Task, workers: int, report: Report) -> None:
        try:
            import ray
        except ImportError as error:
            raise DataError(f"--engine ray needs Ray: {install('ray')}") from error
        self.workers = workers
        self._ray = ray
        self._task = task
        self._report = report
        self._started_here = not ray.is_initialized()
        if self._started_here:
            ray.init(log_to_driver=False)
        self._key = secrets.token_hex(8)
        self._shared_task = ray.put(task)
        self._run = ray.remote(max_retries=2)(_run_on_ray)  # a machine may be lost; a slice may run twice
        self._busy: dict[Any, Slice] = {}

    def start(self, piece: Slice) -> None:
        self._busy[self._run.remote(self._key, self._shared_task, piece)] = piece

    def wait(self) -> tuple[int, _Result]:
        done = self._ray.wait(list(self._busy))[0][0]
        piece = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError) as error:
            raise _died(self._task, piece, "three times") from error
        if isinstance(result, Outcome):
            self._report(result.samples, result.bytes)
        return piece.place.number, result

    def close(self) -> None:
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        if self._started_here:
            self._ray.shutdown()


_ray_worker: tuple[str, SliceWorker] = ("", None)  # kept between the tasks of a run: a tokenizer takes time to load


def _run_on_ray(key: str, task: Task, piece: Slice) -> _Result:
    global _ray_worker
    if _ray_worker[0] != key:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one task is one core
        _ray_worker = key, SliceWorker(task)
    return _attempt(_ray_worker[1], piece)


def _attempt(worker: SliceWorker, piece: Slice) -> _Result:
    try:
        return worker.run(piece)
    except DataError as error:
        return error


def _ending(exitcode: int) -> str:
    return f"by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit code {exitcode}"


def _died(task: Task, piece: Slice, how: str) -> DataError:
    file, first = task.sources[piece.place.source].annotations, piece.place.first
    return DataError(
        f"a worker died ({how}) while it worked on {file}, records {first} to {first + len(piece.bounds) - 1}; run the "
        "same command again to continue, with fewer --workers if memory ran out; if it dies there again, an image "
        "of these records crashes its decoder: leave it out"
    )
