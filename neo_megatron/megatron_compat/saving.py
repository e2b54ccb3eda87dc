"""Megatron's writing of checkpoints, patched so that failures are reported and a save starts no process, on a GPU too.

torch's zip writer hides the error of a full disk in one of its own ("unexpected pos 704 vs 598"), and Megatron keeps
only the type of that one. With asynchronous saves it waits forever for a process that has ended. With synchronous ones,
the first save of every rank takes seconds to start a process that imports torch and Megatron and stays until the run
ends: it only holds the queue through which a thread of the rank hands its results to the rank.
"""

import io
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from neo_megatron.errors import DataError

# As imported: in the process that saves in the background nothing is patched.
_write: Callable[..., None] = FileSystemWriterAsync.write_preloaded_data_multithread
_save = TorchDistSaveShardedStrategy.save
_retrieve = FileSystemWriterAsync.retrieve_write_results
_schedule = PersistentAsyncCaller.schedule_async_call
_is_done = PersistentAsyncCaller.is_current_async_call_done
_failed: list[OSError] = []


class _RawFile(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, path: str, mode: str) -> None:
        self._path = path
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, content: Any) -> int | None:
        try:
            return self._file.write(content)
        except OSError as error:
            error.filename = self._path
            _failed.append(error)
            raise

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        super().close()
        self._file.close()


def _open(path: str | Path, mode: str) -> io.BufferedWriter:
    """Replaces the built-in function, for files that are written."""
    return io.BufferedWriter(_RawFile(str(path), mode))


def write_and_report(transforms: Any, use_msc: bool, rank: int, buckets: Any, results: Any) -> None:
    """Writes as Megatron does, but reports the file system's own error. Public, so that pickle finds it."""
    filesystem_async.open = _open
    _failed.clear()
    reported: queue.SimpleQueue = queue.SimpleQueue()
    try:
        _write(transforms, use_msc, rank, buckets, reported)
        outcome = reported.get()
    except AssertionError as error:  # from a thread that writes
        outcome = RuntimeError(f"a file could not be written: {error}")
    results.put(_failed[0] if isinstance(outcome, Exception) and _failed else outcome)


def retrieve_write_results(writer: FileSystemWriterAsync) -> Any:
    """As Megatron's, but keeps the cause of an error, which would be lost on the way to another rank."""
    outcome = _retrieve(writer)
    if isinstance(outcome, tuple) and isinstance(outcome[0].__cause__, OSError):
        return outcome[0].__cause__, outcome[1]
    return outcome


def save(strategy: TorchDistSaveShardedStrategy, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
    """As Megatron's, which writes in this process, with a queue of this process."""
    between_processes = filesystem_async._results_queue
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        _save(strategy, sharded_state_dict, checkpoint_dir)
    finally:
        filesystem_async._results_queue = between_processes


def is_current_async_call_done(caller: PersistentAsyncCaller, blocking: bool = False, no_dist: bool = False) -> bool:
    """As Megatron's, but raises if the saving process has ended.

    Raises:
        DataError: the save will not finish.
    """
    while True:
        _refuse_ended(caller)
        if (done := _is_done(caller, False, no_dist)) or not blocking:
            return done
        time.sleep(0.1)


def schedule_async_call(caller: PersistentAsyncCaller, async_req: async_utils.AsyncRequest) -> None:
    """As Megatron's, but raises if the saving process has ended, or ends while it receives the tensors.

    Raises:
        DataError: the save will not finish.
    """
    if async_req.async_fn is not None and async_req.preload_fn is not None:
        if caller.process is None:
            caller.process = PersistentAsyncCaller._get_process(torch.distributed.get_rank())
        _refuse_ended(caller)
        tensors = caller._persistent_preload_q
        tensors.join = partial(_join, caller, type(tensors).join.__get__(tensors))
    _schedule(caller, async_req)


def _join(caller: PersistentAsyncCaller, join: Callable[[], None]) -> None:
    waiting = threading.Thread(target=join, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(0.1)
        _refuse_ended(caller)


def _refuse_ended(caller: PersistentAsyncCaller) -> None:
    if caller.process is not None and not caller.process.is_alive():
        raise DataError(
            f"the process that saves in the background has ended (exit code {caller.process.exitcode}; -9 where memory "
            "runs out): run the same command again, which resumes from the checkpoint before, or leave out --async-save"
        )


PATCHES = (
    (TorchDistSaveShardedStrategy, "save", save),
    (FileSystemWriterAsync, "write_preloaded_data_multithread", staticmethod(write_and_report)),
    (FileSystemWriterAsync, "retrieve_write_results", retrieve_write_results),
    (async_utils.PersistentAsyncCaller, "schedule_async_call", schedule_async_call),
    (async_utils.PersistentAsyncCaller, "is_current_async_call_done", is_current_async_call_done),
)
