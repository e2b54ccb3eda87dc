"""Python stacks of the ranks of a run, in its directory, and which rank the others wait for.

Every rank opens `OUTPUT/stacks/rank_NNNNN.txt` at its start. Its processes write their stacks there on a signal, from
C, so that a thread that keeps Python's lock does not prevent it. Only the standard library is needed.
"""

import faulthandler
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SIGNAL = signal.SIGRTMIN  # of those that are free for applications: schedulers and --exit-signal use named ones
_SECONDS_TO_WRITE = 1.0  # a stack, once it is asked for
_SECONDS_TO_MEET = 2.0  # ranks notice a hang at nearly the same time
_SECONDS_BEFORE_NAMING = 6.0  # so long the stacks of other machines are waited for
_BEGIN = re.compile(r"==== [-\d]+ [:\d]+, process (\d+) on (\S+), start (.*)")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_MOST = 3  # ranks that a sentence names
# A rank whose main thread is in one of these waits for other ranks, or for its GPU: file, functions (none: all).
_WAITS = (
    ("torch/distributed/distributed_c10d.py", ()),
    ("torch/distributed/_functional_collectives.py", ()),
    ("megatron/core/pipeline_parallel/p2p_communication.py", ()),
    ("megatron/core/distributed/param_and_grad_buffer.py", ("finish_grad_sync", "finish_param_sync")),
    ("neo_megatron/megatron_compat/steps.py", ("_get_grad_norm", "_signals_received")),
)


@dataclass(frozen=True)
class Standing:
    """A rank's place in its program.

    Args:
        who: rank, process and machine.
        silent: why there is no stack of it; empty if there is one.
        frames: file, line and function of its main thread, innermost first.
    """

    who: str
    silent: str
    frames: tuple[tuple[str, str, str], ...] = ()

    def waits(self) -> bool:
        """Whether it waits for other ranks or its GPU."""
        return any(
            file.endswith(place) and (not functions or function in functions)
            for file, _, function in self.frames
            for place, functions in _WAITS
        )

    def place(self) -> str:
        """``data/reader.py:88 (read)``: its innermost frame in NEO or Megatron, or in anything."""
        own = [frame for frame in self.frames if re.search(r"/(neo_megatron|megatron)/", frame[0])]
        file, line, function = (own or self.frames or [("an unknown place", "0", "unknown")])[0]
        for package in ("/neo_megatron/", "/megatron/", "/site-packages/"):
            if package in file:
                file = package.lstrip("/").removeprefix("site-packages/") + file.rpartition(package)[2]
                break
        return f"{file}:{line} ({function})"


class Stacks:
    """The files of stacks of a start of a run; this process is one of its ranks.

    Args:
        save: directory of the run.
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, save: str | Path, rank: int, ranks: int) -> None:
        self.directory = Path(save).resolve() / "stacks"
        self._rank, self._ranks = rank, ranks
        self._start = "/".join(
            os.environ.get(name, "")
            for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.file = self._path(rank).open("ab", buffering=0)  # loader workers inherit it, as they do the signal handler
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._say(rank, f"==== {now}, process {os.getpid()} on {socket.gethostname()}, start {self._start}")
        faulthandler.enable(self.file)  # a library that aborts, as NCCL's watchdog does, leaves the stack as well
        faulthandler.register(_SIGNAL, self.file)

    def write(self, reason: str) -> None:
        """Writes the stacks of this rank and of its loader workers, then those of all other ranks of this machine."""
        for rank in (self._rank, *(other for other in range(self._ranks) if other != self._rank)):
            if rank == self._rank or self._is_silent(rank):
                self._write_of(rank, reason)

    def write_when_met(self, reason: str) -> None:
        """As `write`, after the other ranks had time to write their own; then waits for those of other machines."""
        self._write_of(self._rank, reason)
        deadline = time.monotonic() + _SECONDS_BEFORE_NAMING
        time.sleep(_SECONDS_TO_MEET)
        for rank in range(self._ranks):
            if self._is_silent(rank):
                self._write_of(rank, f"asked for by rank {self._rank}, {reason}")
        while any(map(self._is_awaited, range(self._ranks))) and time.monotonic() < deadline:
            time.sleep(_SECONDS_TO_WRITE / 2)

    def continue_stopped(self) -> None:
        """Continues ranks of this machine that are stopped, so that they write their stacks and can be ended."""
        for rank in range(self._ranks):
            section = self._section(rank)
            if section is not None and section.pid in _processes_with(self._path(rank)) and _state(section.pid) == "T":
                os.kill(section.pid, _SIGNAL)
                os.kill(section.pid, signal.SIGCONT)

    def culprits(self) -> str:
        """Names the ranks that the others wait for, from all stacks that were written."""
        standings = [self._standing(rank) for rank in range(self._ranks)]
        silent = [f"{it.who} {it.silent}" for it in standings if it.silent]
        at_work = [f"{it.who} stands at {it.place()}" for it in standings if not it.silent and not it.waits()]
        named = silent or at_work
        if not named:
            return f"all ranks wait, for one another or their GPUs: {standings[0].who} at {standings[0].place()}"
        more = len(named) - _MOST
        return ", ".join(named[:_MOST]) + (f" and {more} more ranks" if more > 0 else "")

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank_{rank:05d}.txt"

    def _say(self, rank: int, text: str) -> None:
        with self._path(rank).open("ab", buffering=0) as file:
            file.write(f"{text}\n".encode())

    def _write_of(self, rank: int, reason: str) -> None:
        path = self._path(rank)
        for pid in _processes_with(path):
            stands = _STANDS.get(_state(pid), "")
            told = f"---- {time.strftime('%H:%M:%S')}, process {pid}{stands and ' '}{stands}: {reason}"
            self._say(rank, told)
            if not stands:
                _ask(pid, path)

    def _section(self, rank: int) -> "_Section | None":
        """The part of a rank's file that is about this start; ``None`` before it has begun."""
        try:
            lines = self._path(rank).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return None
        begins = [(number, match) for number, line in enumerate(lines) if (match := _BEGIN.fullmatch(line))]
        of_start = [(number, match) for number, match in begins if match[3] == self._start]
        if not of_start:
            return None
        number, match = of_start[-1]
        end = next((later for later, _ in begins if later > number), len(lines))
        return _Section(int(match[1]), match[2], lines[number + 1 : end])

    def _is_silent(self, rank: int) -> bool:
        return bool(self._standing(rank).silent)

    def _is_awaited(self, rank: int) -> bool:
        section = self._section(rank)
        return section is not None and section.host != socket.gethostname() and self._is_silent(rank)

    def _standing(self, rank: int) -> Standing:
        section = self._section(rank)
        if section is None:
            return Standing(f"rank {rank}", "has not begun")
        who = f"rank {rank} (process {section.pid} on {section.host})"
        if stands := section.stands():
            return Standing(who, stands)
        if frames := section.main_thread():
            return Standing(who, "", frames)
        if section.host != socket.gethostname():
            return Standing(who, "has written no stack: it is stopped, or its machine is gone")
        alive = section.pid in _processes_with(self._path(rank))
        return Standing(who, "has written no stack" if alive else "is gone")


# States of /proc/PID/stat in which a process can do nothing.
_STANDS = {
    "T": "is stopped, as by SIGSTOP",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or a file system that does not answer",
}


@dataclass(frozen=True)
class _Section:
    """A start of a rank in its file.

    Args:
        pid, host: process and machine.
        lines: without the first one, which says so.
    """

    pid: int
    host: str
    lines: list[str]

    def stands(self) -> str:
        """The state in which it can do nothing; empty if it was in none."""
        headings = [line for line in self.lines if re.match(rf"---- \S+, process {self.pid} ", line)]
        return next((stands for line in headings for stands in _STANDS.values() if stands in line), "")

    def main_thread(self) -> tuple[tuple[str, str, str], ...]:
        """Frames of the main thread, the last one of a stack, in the last stack."""
        frames: list[tuple[str, str, str]] = []
        mine = False
        for line in self.lines:
            if line.startswith("---- "):
                mine = f", process {self.pid}:" in line
            elif mine and line.endswith(" (most recent call first):"):
                frames = []
            elif mine and (match := _FRAME.fullmatch(line)):
                frames.append((match[1], match[2], match[3]))
        return tuple(frames)


def _ask(pid: int, path: Path) -> None:
    """Makes a process write its stack, and waits for it."""
    size = path.stat().st_size
    try:
        os.kill(pid, _SIGNAL)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + _SECONDS_TO_WRITE
    while path.stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # its last lines


def _processes_with(path: Path) -> list[int]:
    """Processes of this machine that write their stacks into a file: a rank, then its loader workers."""
    return sorted(pid for pid in _processes() if _opened(pid, path) and _handles_signal(pid))


def _processes() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            yield int(entry.name)


def _opened(pid: int, path: Path) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # it has ended, or belongs to another user
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") == str(path):
                return True
        except OSError:
            continue
    return False


def _handles_signal(pid: int) -> bool:
    """Whether a process has a handler for the signal, which would end any other one, such as `tail -f` of the file."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (_SIGNAL - 1) & 1)


def _state(pid: int) -> str:
    """The state of a process, as the letter of /proc; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
