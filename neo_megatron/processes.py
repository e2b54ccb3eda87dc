"""Processes of a pool: Ctrl-C is for the process that the user sees, and none outlives it."""

import os
import signal
import threading
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess


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


SPAWN = _Context()  # not fork, since a fork of a process with threads may hang
