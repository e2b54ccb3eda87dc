"""Runs `python -m neo_megatron.pretrain_neo` of which one rank, or all, fail in the second step in a given way.

Arguments: the way, the rank or "all", then the flags of pretrain_neo.
"""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import time

from neo_megatron.errors import DataError
from neo_megatron.pretrain_neo import main
from neo_megatron.run import pretraining

forward_step, calls = pretraining.forward_step, 0


def failing_step(*arguments):
    global calls
    calls += 1
    if calls == 4 and who in ("all", os.environ["RANK"]):
        print("the last line before the end")
        if way == "sentence":
            raise DataError("a sentence with a remedy")
        if way == "bug":
            raise TypeError("a bug")
        if way == "full disk":
            raise RuntimeError("a library's words") from OSError(errno.ENOSPC, "No space left on device", "/some/file")
        if way == "package":
            import no_such_package  # noqa: F401
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "no more room":  # no file may grow beyond a megabyte, as if the disk were full
            for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
                resource.prlimit(process, resource.RLIMIT_FSIZE, (2**20, 2**20))
        if way == "kill savers":
            for child in multiprocessing.active_children():
                child.kill()
        if way == "kill loader":
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(60)
        if way == "hang":
            os.write(2, b"words of C++\n")
            time.sleep(600)
    return forward_step(*arguments)


if __name__ == "__main__":  # processes that save in the background import this file too
    way, who = sys.argv[1:3]
    sys.argv[1:3] = []
    pretraining.forward_step = failing_step
    main()
