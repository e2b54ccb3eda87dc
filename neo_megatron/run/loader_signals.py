"""Workers of a data loader outlive the signal by which a rank is told to save and exit.

Schedulers and shells send a signal to all processes of a rank. PyTorch's workers would end at once, and the rank, which
finishes its step and saves, would fail for lack of data.
"""

import os
import signal
import threading


def heed_only_parent(number: int, worker: int = 0) -> None:
    """Makes a worker ignore a signal unless its parent sends it, as PyTorch does to end one that hangs.

    To be called in the main thread of the new process, before it starts others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the rank, which ends its workers
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    threading.Thread(target=_wait, args=(number, os.getppid()), daemon=True).start()


def _wait(number: int, parent: int) -> None:
    while signal.sigwaitinfo({number}).si_pid != parent:
        pass
    os._exit(0)
