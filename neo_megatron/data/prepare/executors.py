"""Executors for annotation slices: in-process, a pool of local processes, or Ray.

Workers write into the output directory, so an executor transfers little, and may run a slice twice.
"""

import os
import secrets
from collections.abc import Callable
from typing import Any, Literal

from neo_megatron.data.prepare.annotation_slices import Slice
from neo_megatron.data.prepare.resume import Outcome
from neo_megatron.data.prepare.worker import SliceWorker, Task
from neo_megatron.errors import DataError
from neo_megatron.packages import install
from neo_megatron.worker_pool import Executor, WorkerDied, WorkerPool

ExecutorName = Literal["local", "ray"]
Report = Callable[[int, int], Any]  # as of SliceWorker


def open_executor(name: ExecutorName, task: Task, workers: int, report: Report) -> Executor:
    """The executor of a name, for slices and their outcomes; one local worker is this process.

    Args:
        name: "local" or "ray".
        task: of the workers.
        workers: number of slices that run at the same time.
        report: see `SliceWorker`.

    Raises:
        DataError: Ray is asked for and not installed; from `wait`: a worker died.
    """
    if name == "ray":
        return RayExecutor(task, workers, report)
    return InlineExecutor(task, report) if workers == 1 else LocalExecutor(task, workers, report)


class InlineExecutor:
    """Runs slices in this process, one after another."""

    workers = 1

    def __init__(self, task: Task, report: Report) -> None:
        self._worker = SliceWorker(task, report)

    def start(self, number: int, piece: Slice) -> None:
        self._started = number, piece

    def wait(self) -> tuple[int, Outcome]:
        number, piece = self._started
        return number, self._worker.run(piece)

    def close(self) -> None:
        pass


class LocalExecutor(WorkerPool):
    """Runs slices in processes on this machine."""

    def __init__(self, task: Task, workers: int, report: Report) -> None:
        super().__init__(workers, _prepare, task, report)
        self._task = task

    def wait(self) -> tuple[int, Outcome | Exception]:
        try:
            return super().wait()
        except WorkerDied as died:
            raise _died(self._task, died.item, died.how) from died


def _prepare(task: Task, report: Report) -> Callable[[Slice], Outcome]:
    return SliceWorker(task, report).run


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
        self._busy: dict[Any, tuple[int, Slice]] = {}

    def start(self, number: int, piece: Slice) -> None:
        self._busy[self._run.remote(self._key, self._shared_task, piece)] = number, piece

    def wait(self) -> tuple[int, Outcome | DataError]:
        done = self._ray.wait(list(self._busy))[0][0]
        number, piece = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError) as error:
            raise _died(self._task, piece, "three times") from error
        if isinstance(result, Outcome):
            self._report(result.samples, result.bytes)
        return number, result

    def close(self) -> None:
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        if self._started_here:
            self._ray.shutdown()


_ray_worker: tuple[str, SliceWorker] = ("", None)  # kept between the tasks of a run: a tokenizer takes time to load


def _run_on_ray(key: str, task: Task, piece: Slice) -> Outcome | DataError:
    global _ray_worker
    if _ray_worker[0] != key:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one task is one core
        _ray_worker = key, SliceWorker(task)
    try:
        return _ray_worker[1].run(piece)
    except DataError as error:
        return error  # raised in the order of the slices, without the traceback of Ray


def _died(task: Task, piece: Slice, how: str) -> DataError:
    file, first = task.sources[piece.place.source].annotations, piece.place.first
    return DataError(
        f"a worker died ({how}) while it worked on {file}, records {first} to {first + len(piece.bounds) - 1}; run the "
        "same command again to continue, with fewer --workers if memory ran out; if it dies there again, an image "
        "of these records crashes its decoder: leave it out"
    )
