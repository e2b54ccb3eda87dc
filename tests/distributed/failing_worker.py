"""Runs `python -m neo_megatron.pretrain_neo` of which one rank, or all, fail in the second step in a given way.

Arguments: the way, the rank or "all", then the flags of pretrain_neo. What needs no model, but for ranks that wait for
one another, fails in a loop of collectives instead of a training, which starts several times sooner.
"""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import types

from neo_megatron.errors import DataError
from neo_megatron.pretrain_neo import main

OF_A_TRAINING = (
    *("no more room", "kill savers", "kill loader", "stop", "kill a training", "kill machine", "deadlock loader"),
)


def fail() -> None:
    print("the last line before the end")
    if way in ("sentence", "sentence and hang"):
        raise DataError("a sentence with a remedy")
    if way == "bug":
        raise TypeError("a bug")
    if way == "full disk":
        raise RuntimeError("a library's words") from OSError(errno.ENOSPC, "No space left on device", "/some/file")
    if way == "package":
        import no_such_package  # noqa: F401
    if way == "kill machine":
        os.kill(os.getppid(), signal.SIGKILL)
    if way in ("kill", "kill a training", "kill machine"):
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
    if way == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "hang":
        os.write(2, b"words of C++\n")
        time.sleep(600)


def fail_in_time(calls: list[None]) -> None:
    """Each step has two micro-batches a rank."""
    calls.append(None)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if len(calls) == 4 and who in ("all", os.environ["RANK"]) and not restarted:
        fail()


def deadlocked(*_: object) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def steps_of_collectives() -> None:
    import torch

    torch.distributed.init_process_group("gloo")
    calls: list[None] = []
    while True:
        fail_in_time(calls)
        if way == "sentence and hang" and len(calls) == 4:  # ranks in a collective of NCCL notice nothing
            time.sleep(600)
        torch.distributed.all_reduce(torch.ones(1))


if __name__ == "__main__":
    way, who = sys.argv[1:3]
    sys.argv[1:3] = []
    if way in OF_A_TRAINING:
        from neo_megatron.run import loaders, pretraining

        forward_step, calls = pretraining.forward_step, []

        def failing_step(*arguments):
            fail_in_time(calls)
            return forward_step(*arguments)

        pretraining.forward_step = failing_step
        if way == "deadlock loader" and who == os.environ["RANK"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            collate, read = loaders.collate, []

            def collate_or_hang(packs):
                read.append(None)
                return deadlocked() if len(read) > 3 else collate(packs)

            loaders.collate = collate_or_hang
    else:
        stub = types.ModuleType("neo_megatron.run.pretraining")
        stub.train = steps_of_collectives
        sys.modules[stub.__name__] = stub
    main()
elif __name__ == "__mp_main__":  # as in pretrain_neo
    from neo_megatron.megatron_compat import cpu_platform

    cpu_platform.install_training()
