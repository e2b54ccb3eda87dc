"""Ends a rank that makes no progress, with a sentence that names the rank that all wait for.

Steps, evaluations, saves and the stages of a start are noted. A rank that notes nothing for four fifths of the time
that Megatron lets a collective take (`--distributed-timeout-minutes`, after the first step
`--distributed-timeout-seconds-after-init`) writes the stacks of all ranks and ends the run; in the rest of that time no
collective times out, which would have less to say. One thread of every rank does it: a rank that is stopped, or that
keeps Python's lock, is noticed by the others, which wait for it, and alone by the timer of `faulthandler`.

The monitors of others do not serve. torchrun's file timer sends its signal to its own process too, so that nothing is
left to restart, and ranks that Slurm starts have no torchrun; neither it nor the monitor of nvidia-resiliency-ext,
which needs a launcher of its own, writes stacks; NCCL's watchdog sees no rank that is alone, and nothing without a GPU.
"""

import faulthandler
import threading
import time
from argparse import Namespace
from collections.abc import Callable

from neo_megatron.run.stacks import Stacks

_SHARE = 0.8
_SECONDS_BEHIND_THREAD = 60  # the timer of `faulthandler` ends a process whose thread cannot run


class Progress:
    """The progress of this process; notes cost nothing before `watch`."""

    def __init__(self) -> None:
        self._stacks: Stacks | None = None
        self._ended = threading.Event()
        self._end: Callable[[str], object] | None = None

    def end_by(self, end: Callable[[str], object]) -> None:
        """Says how a process ends that makes no progress: by a function, called in a thread, that takes a sentence."""
        self._end = end

    def watch(self, args: Namespace) -> None:
        """Begins to watch a run that saves; any other one has no directory for stacks, and nothing to resume from."""
        if self._end is None or not args.save:
            return
        self._stacks = Stacks(args.save, args.rank, args.world_size)
        self._seconds_after_init = args.distributed_timeout_seconds_after_init
        self._allow("--distributed-timeout-minutes", args.distributed_timeout_minutes * 60)
        self.note("the start")
        threading.Thread(target=self._watch, daemon=True).start()

    def end_start(self) -> None:
        """Notes that a step was taken, after which Megatron's collectives may have another time."""
        if self._stacks is not None and self._seconds_after_init is not None:
            self._allow("--distributed-timeout-seconds-after-init", self._seconds_after_init)

    def note(self, doing: str) -> None:
        """Notes that something begins."""
        if self._stacks is None:
            return
        self._doing, self._since = doing, time.monotonic()
        faulthandler.dump_traceback_later(self._seconds + _SECONDS_BEHIND_THREAD, exit=True, file=self._stacks.file)

    def write_stacks(self, reason: str) -> None:
        """Writes the stacks of all ranks of this machine and of their loader workers, before an error about a hang."""
        if self._stacks is not None:
            self._stacks.write(reason)

    def end(self) -> None:
        """Ends the watch; what follows may take any time."""
        self._ended.set()
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()

    def _allow(self, flag: str, seconds: float) -> None:
        self._flag, self._seconds = flag, seconds * _SHARE

    def _watch(self) -> None:
        while not self._ended.wait(1):
            since, doing = self._since, self._doing
            if time.monotonic() - since < self._seconds:
                continue
            self._stacks.write_when_met(f"no progress in {doing} for {time.monotonic() - since:.0f} s")
            sentence = (
                f"{doing} has made no progress for {time.monotonic() - since:.0f} s: {self._stacks.culprits()}; the "
                f"Python stacks of the ranks are in {self._stacks.directory}: the same command resumes; if it was "
                f"merely slow, raise {self._flag}, of which {_SHARE:.0%} are waited"
            )
            if self._since == since and not self._ended.is_set():
                self._stacks.continue_stopped()
                self._end(sentence)


progress = Progress()  # of this process
