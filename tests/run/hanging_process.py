"""A rank, of the standard library alone, that stands still in a given way.

    python hanging_process.py SAVE RANK RANKS SECONDS WAY

It watches its progress with collectives of so many seconds, prints "begun", and the sentence that it ends with.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from argparse import Namespace

from neo_megatron.run import progress as watched
from neo_megatron.run.progress import progress

# Stands for a collective: frames are known by their file.
COLLECTIVE = compile("def all_reduce(): sleep(600)", "/lib/torch/distributed/distributed_c10d.py", "exec")


def end(sentence: str) -> None:
    print(sentence, flush=True)
    os._exit(1)


def stand_still(way: str) -> None:
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif way == "waits":
        names = {"sleep": time.sleep}
        exec(COLLECTIVE, names)
        names["all_reduce"]()
    elif way == "fifo":
        os.mkfifo(f"{save}/fifo")
        os.open(f"{save}/fifo", os.O_RDONLY)  # a file system that does not answer
    elif way == "lock of Python":
        ctypes.PyDLL(None).sleep(600)
    elif way == "worker":
        if not os.fork():
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
            os.close(1)
            os.close(2)
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        time.sleep(600)
    elif way == "slow":
        for step in range(6):
            progress.note(f"step {step}")
            time.sleep(float(seconds) / 3)
        progress.end()
        time.sleep(float(seconds))
        print("done", flush=True)


if __name__ == "__main__":
    save, rank, ranks, seconds, way = sys.argv[1:]
    if (ranks, way) == ("1", "lock of Python"):  # others need the time until their thread has written all stacks
        watched._SECONDS_BEHIND_THREAD = 1
    progress.end_by(end)
    times = {"distributed_timeout_minutes": 10, "distributed_timeout_seconds_after_init": float(seconds)}
    progress.watch(Namespace(save=save, rank=int(rank), world_size=int(ranks), **times))
    progress.end_start()
    progress.note("step 7")
    print("begun", flush=True)
    stand_still(way)
