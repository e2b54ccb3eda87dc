"""Processes of a pool: Ctrl-C is for the process that the user sees, and none outlives it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess

# Where a signal ends a tool, the tracker removes its semaphores; its warning of that would look like a mistake.
sys.warnoptions.append("ignore:resource_tracker")
_SECONDS_STOPPED = 10.0  # a debugger or a job scheduler stops a process for a moment


class _Process(SpawnProcess):
    """Deaf to Ctrl-C from its first instruction on: its imports, which take seconds, would end with a traceback."""

    def start(self) -> None:
        resource_tracker.ensure_running()  # starting it would unblock the signal again
        # A new process inherits what its parent's thread blocks; the parent gets its own Ctrl-C when it unblocks.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class _Context(SpawnContext):
    Process = _Process


def _end_with_parent() -> None:
    """A pool would wait forever for the tasks of a process that a signal has ended."""
    parent_process().join()
    os._exit(1)


class StoppedWorkers:
    """Tells of workers that SIGSTOP holds, so that a tool does not seem to hang; it waits for them to be continued."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._told: set[int] = set()

    def look(self, pids: Iterable[int]) -> None:
        """To be called every second or so while results are waited for."""
        now = time.monotonic()
        stopped = {pid for pid in pids if _is_stopped(pid)}
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        self._told &= stopped
        for pid, since in self._since.items():
            if now - since >= _SECONDS_STOPPED and pid not in self._told:
                self._told.add(pid)
                print(
                    f"worker process {pid} is stopped (SIGSTOP) and is waited for: continue it with kill -CONT {pid}, "
                    f"or end it with kill -KILL {pid}",
                    file=sys.stderr,
                    flush=True,
                )


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:  # it has ended, which its pool notices
        return False


SPAWN = _Context()  # not fork, since a fork of a process with threads may hang
