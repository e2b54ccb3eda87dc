"""Runs `pretrain_neo` on one process again and again, each time killed at another moment, until it comes to its end.

    python kill_worker.py JOB.json

The job has `argv`, `directory` to log in, `root`, the directory that the run saves into, and `moments`: at which file
operation under it to kill, once for each start; afterwards the run is started once more and left alone. A moment is
[label, number]: the number-th time that an operation with this label is about to happen, or, for "opened", has happened
and the file is still empty. Labels are as in "rename .metadata.tmp"; numbers of iterations are left out of them. Or it
is a number of seconds since the start; where the run ends before, no other moments follow.

Megatron is imported once and every start is a fork. The process group of a start is killed, the writer of an
asynchronous save included, whose own operations are not counted. Each start appends to `log`: a line for every
operation, for every micro-batch that was read (a checksum of its tokens and images), and for every step (its loss,
all bits).
"""

import builtins
import contextlib
import gc
import io
import json
import mmap
import os
import re
import signal
import socket
import sys
import time
import traceback
import zlib
from pathlib import Path

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()

if __name__ == "__main__":  # the writer of an asynchronous save imports this file as well, and needs no more
    cpu_platform.install_training()

    from megatron.training import training

    from neo_megatron.run import loaders, pretraining


class Moments:
    """Counts the operations under a directory, in this process and its forks, and kills them all at one of them."""

    def __init__(self, root: str, log: Path, moment: tuple[str, int] | None) -> None:
        self.root, self.moment = root, moment
        self.seen = mmap.mmap(-1, 8)  # shared with forks
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.group = os.getpid()

    def note(self, line: str) -> None:
        os.write(self.log, (line + "\n").encode())

    def happens(self, kind: str, path: object, directory: int = -1) -> None:
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        if directory >= 0:  # a file descriptor, as rmtree gives it
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        if not path.startswith(self.root):
            return
        label = f"{kind} " + re.sub(r"iter_\d+", "iter", os.path.basename(path))
        self.note(f"operation {label}")
        if self.moment and label == self.moment[0]:
            number = int.from_bytes(self.seen[:8]) + 1
            self.seen[:8] = number.to_bytes(8)
            if number == self.moment[1]:
                self.note("killed")
                os.killpg(self.group, signal.SIGKILL)

    def watch(self) -> None:
        # The place among an event's arguments of the directory that the path is relative to.
        events = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}

        def hook(event: str, arguments: tuple) -> None:
            if event in events:
                self.happens(event.removeprefix("os."), arguments[0], arguments[events[event]])

        sys.addaudithook(hook)
        original, fsync = io.open, os.fsync

        def open_(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return original(file, mode, *args, **kwargs)
            self.happens("open", file)
            opened = original(file, mode, *args, **kwargs)
            self.happens("opened", file)
            return opened

        def fsync_(descriptor):
            self.happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        builtins.open = io.open = open_
        os.fsync = fsync_


def run(job: dict, moment: tuple[str, int] | None) -> None:
    """One start, in a process group of its own; comes back unless killed."""
    os.setpgid(0, 0)
    directory = Path(job["directory"])
    moments = Moments(job["root"], directory / "log", moment)
    moments.note("start")
    collate, training_log = loaders.collate, training.training_log

    def noted_collate(packs):
        batch = collate(packs)
        sums = [zlib.crc32(batch[key].numpy().tobytes()) for key in ("tokens", "target_weight", "patches")]
        moments.note(f"batch {sums}")
        return batch

    def noted_log(loss_dict, *args, **kwargs):
        moments.note(f"loss {pretraining.get_args().curr_iteration + 1} {float(loss_dict['lm loss']).hex()}")
        return training_log(loss_dict, *args, **kwargs)

    loaders.collate, training.training_log = noted_collate, noted_log
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["pretrain_neo", *job["argv"]]
    printed = os.open(directory / "printed.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    moments.watch()
    pretraining.train()
    moments.note("end")


def directory_log(job: dict) -> Path:
    return Path(job["directory"]) / "log"


def end_after(child: int, seconds: float, log: Path) -> int:
    """Kills a start at a moment, unless it has ended before; its status as of `os.waitpid`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    with log.open("a") as file:
        file.write("killed\n")
    return os.waitpid(child, 0)[1]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["directory"]).mkdir(parents=True, exist_ok=True)
    gc.freeze()  # imported objects are not garbage in the forks
    for moment in [*job["moments"], None]:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    run(job, tuple(moment) if isinstance(moment, list) else None)
                    status = 0
                except SystemExit as stop:
                    status = int(stop.code != 0)
                    print(stop.code)
                except BaseException:
                    traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        if isinstance(moment, float):
            status = end_after(child, moment, directory_log(job))
        else:
            _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # a writer that its start has left behind
        ended = os.waitstatus_to_exitcode(status)
        if ended == 0 and isinstance(moment, float):
            break
        if ended != (-signal.SIGKILL if moment else 0):
            sys.exit(
                f"moment {moment}: ended with {ended}\n{Path(job['directory'], 'printed.log').read_text()[-4000:]}"
            )


if __name__ == "__main__":
    main()
