"""Worker processes of the data loaders: which signals they heed, and how their ends are told.

Schedulers and shells send a signal to all processes of a rank. PyTorch's workers would end at once, and the rank, which
finishes its step and saves, would fail for lack of data.

A worker hands a pack over in shared memory, from a thread of its own. Where /dev/shm is full, Python prints an error of
this thread and drops the pack, and the rank would wait for it for ever; here the worker ends, and the rank says why.
"""

import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from neo_megatron.errors import DataError

SHARED_MEMORY = "/dev/shm"
_CANNOT_HAND_OVER = 74  # the exit code of a worker; EX_IOERR of sysexits.h
_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ")
_MORE_ROOM = "give the container more (docker run --shm-size=8g, or --ipc=host), or fewer --num-workers"
_workers: dict[int, BaseProcess] = {}  # by process number


def begin_worker(number: int, worker: int = 0) -> None:
    """Prepares a worker, before it starts threads.

    Args:
        number: of the signal by which a rank is told to save and exit.
        worker: as PyTorch counts them.
    """
    heed_only_parent(number)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def heed_only_parent(number: int) -> None:
    """Makes a worker ignore a signal unless its parent sends it, as PyTorch does to end one that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the rank, which ends its workers
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    threading.Thread(target=_wait, args=(number, os.getppid()), daemon=True).start()


def _wait(number: int, parent: int) -> None:
    while signal.sigwaitinfo({number}).si_pid != parent:
        pass
    os._exit(0)


def _end_worker(error: Exception, _: Any) -> NoReturn:
    """In place of Python's own, which prints the error and continues without the batch."""
    traceback.print_exception(error)
    os._exit(_CANNOT_HAND_OVER)


def seconds_to_wait(args: Namespace) -> float:
    """How long a rank waits for a micro-batch; 0 without workers, where it reads by itself.

    Half of what other ranks wait for this one, so that the sentence about the pack comes before theirs.
    """
    return args.distributed_timeout_minutes * 60 / 2 if args.num_workers else 0


def late(worker: int, workers: int, packs: str, seconds: float) -> DataError:
    """The error message for a worker that does not deliver."""
    return DataError(
        f"worker {worker} of {workers} of the data loader has not delivered {packs} within "
        f"{seconds:g} s: look at the storage of the packs; where it is slow, raise --distributed-timeout-minutes, "
        "of which half is waited"
    )


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; its workers are remembered, so that their ends can be told."""
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    _workers.update({worker.pid: worker for worker in workers})
    return _batches(batches, workers)


def _batches(batches: Iterator[Any], workers: set[BaseProcess]) -> Iterator[Any]:
    """The same, and the error that PyTorch has for a worker that ended, also where it ends while it hands over."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            for worker in workers:
                worker.join(timeout=1)
            ended = next((worker for worker in workers if worker.exitcode is not None), None)
            if ended is None:
                raise
            raise RuntimeError(f"DataLoader worker (pid {ended.pid}) ended while it handed over a pack") from error
        yield batch


def describe_ended_worker(error: BaseException) -> str | None:
    """A sentence about the worker whose end PyTorch reports by this error; `None` for another error."""
    match = _ENDED.match(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    ended = [_workers[pid] for pid in map(int, match[1].split(",")) if pid in _workers]
    for worker in ended:
        worker.join(timeout=1)  # else its exit code may not be known yet
    worker = next((worker for worker in ended if worker.exitcode), None)
    who, code = f"a worker of the data loader (process {match[1]})", worker.exitcode if worker else 0
    if code in (_CANNOT_HAND_OVER, -signal.SIGBUS):
        return f"{who} could not hand over a pack: {SHARED_MEMORY} is full; {_MORE_ROOM}"
    if code == -signal.SIGKILL:
        return f"{who} was ended by SIGKILL, as the system does where memory runs out: use fewer --num-workers"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{who} {how}; the log of this rank has more"


def check_room(pack_bytes: int, packs: int) -> None:
    """Compares what the workers of all ranks of this machine keep in shared memory with the room there.

    Args:
        pack_bytes: of the largest pack.
        packs: that are there at a time.

    Raises:
        DataError: there is too little.
    """
    try:
        room = os.statvfs(SHARED_MEMORY)
    except FileNotFoundError:
        return
    free, needed = room.f_bavail * room.f_frsize, pack_bytes * packs
    if needed > free:
        raise DataError(
            f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, and the workers of the data loaders on this machine keep "
            f"up to {packs} packs of {pack_bytes / 1e6:,.1f} MB there: give the container more (docker run "
            f"--shm-size={-(-needed * 5 // 4 // 2**30)}g, or --ipc=host), or fewer --num-workers (0 needs none)"
        )
