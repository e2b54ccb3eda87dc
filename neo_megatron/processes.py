"""Processes for pools: they ignore Ctrl-C, which their parent handles, and never outlive it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess

# When a signal ends a tool, the resource tracker removes its semaphores; its warning would look like an error.
sys.warnoptions.append("ignore:resource_tracker")
_SECONDS_STOPPED = 10.0  # debuggers and job schedulers stop processes for a moment


class _Process(SpawnProcess):
    """Blocks Ctrl-C from its first instruction on; otherwise its imports, which take seconds, print a traceback."""

    def start(self) -> None:
        """Starts the process with SIGINT blocked."""
        resource_tracker.ensure_running()  # starting it later would unblock the signal again
        # A new process inherits the signals that its parent's thread blocks; the parent gets Ctrl-C when it unblocks.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """Runs the target until it or the parent ends."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class _Context(SpawnContext):
    Process = _Process


def _end_with_parent() -> None:
    """Ends this process when its parent ends; it would wait forever for tasks of a parent that a signal has ended."""
    parent_process().join()
    os._exit(1)


class StoppedWorkers:
    """Reports workers that SIGSTOP has stopped, so that a tool that waits for them does not seem to hang."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._told: set[int] = set()

    def look(self, pids: Iterable[int]) -> None:
        """Checks processes; to be called about once a second while waiting for results."""
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
    except OSError:  # it has ended, which its pool will notice
        return False


SPAWN = _Context()  # not fork, because a fork of a process with threads may hang
