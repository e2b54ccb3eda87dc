"""Kills a process at a chosen rename or removal of a file, where outputs are most at risk."""

import os
import signal
import sys

STEPS = ("replace", "rename", "unlink")


def in_child(action) -> int:
    """Runs in a fork, so that a test can be killed; the status as of `os.waitpid`."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            action()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(child, 0)[1]


def kill_at_step(step: int, before: bool) -> None:
    """Kills this process at the n-th rename or removal from now on."""
    left = step
    originals = {name: getattr(os, name) for name in STEPS}

    def counted(name):
        def call(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                originals[name](*arguments, **keywords)
            finally:  # it may be that of a file that need not be there
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in STEPS:
        setattr(os, name, counted(name))
