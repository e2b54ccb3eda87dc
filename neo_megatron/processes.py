"""Processes of a pool: Ctrl-C is for the process that the user sees, which ends the others."""

import signal
from multiprocessing import resource_tracker
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


class _Context(SpawnContext):
    Process = _Process


SPAWN = _Context()  # not fork, since a fork of a process with threads may hang
