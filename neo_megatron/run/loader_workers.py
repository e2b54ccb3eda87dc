"""Worker processes of the data loaders: which signals they handle, and how their failures are reported.

Schedulers and shells send a signal to all processes of a rank. PyTorch's workers would end at once, and the rank, which
finishes its step and saves, would fail for lack of data.

A worker hands a pack over in shared memory, from a thread of its own. Where /dev/shm is full, Python prints an error of
this thread and drops the pack, and the rank would wait for it forever; here the worker ends, and the rank reports why.
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
_workers: dict[int, BaseProcess] = {}  # keyed by process id


def begin_worker(number: int, worker: int = 0) -> None:
    """Prepares a worker, before it starts threads.

    Args:
        number: of the signal that makes a rank save and exit.
        worker: as PyTorch counts them.
    """
    heed_only_parent(number)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def heed_only_parent(number: int) -> None:
    """Makes a worker ignore a signal unless its parent sends it, as PyTorch does to end one that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the rank, which ends its workers
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    threading.Thread(target=_wait, args=(number, os.getppid()), daemon=True).start()


def _wait(number: int, parent: int) -> None:
    while signal.sigwaitinfo({number}).si_pid != parent:
        pass
    os._exit(0)


def _end_worker(error: Exception, _: Any) -> NoReturn:
    """Ends the worker; Python's own handler prints the error and continues without the batch."""
    traceback.print_exception(error)
    os._exit(_CANNOT_HAND_OVER)


def seconds_to_wait(args: Namespace) -> float:
    """Seconds that a rank waits for a micro-batch; 0 without workers, because it then reads by itself.

    Half of the time that other ranks wait for this one, so that the error names the pack before they time out.
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
    """The loader's batches; its workers are recorded, so that their failures can be described."""
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    _workers.update({worker.pid: worker for worker in workers})
    return _batches(batches, workers)


def _batches(batches: Iterator[Any], workers: set[BaseProcess]) -> Iterator[Any]:
    """The batches; raises PyTorch's error for a dead worker also if it died while it handed a batch over."""
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
    """A sentence about the worker whose death PyTorch reports by this error; `None` for another error."""
    match = _ENDED.match(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    ended = [_workers[pid] for pid in map(int, match[1].split(",")) if pid in _workers]
    for worker in ended:
        worker.join(timeout=1)  # its exit code may not be known yet
    worker = next((worker for worker in ended if worker.exitcode), None)
    who, code = f"a worker of the data loader (process {match[1]})", worker.exitcode if worker else 0
    if code in (_CANNOT_HAND_OVER, -signal.SIGBUS):
        return f"{who} could not hand over a pack: {SHARED_MEMORY} is full; {_MORE_ROOM}"
    if code == -signal.SIGKILL:
        return f"{who} was ended by SIGKILL, as the system does where memory runs out: use fewer --num-workers"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{who} {how}; the log of this rank has more"


def check_room(pack_bytes: int, packs: int) -> None:
    """Checks that shared memory has room for the packs that the workers of all ranks of this machine hold.

    Args:
        pack_bytes: of the largest pack.
        packs: that are in shared memory at the same time.

    Raises:
        DataError: there is too little room.
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
