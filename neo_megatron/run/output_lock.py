"""A lock on the directory that a run saves to: a file with owner and heartbeat, on any file system.

Advisory locks of the kernel (`flock`) are not relied on: shared file systems ignore them between machines, and they do
not name the owner. Whether an owner is alive is read from `/proc` if its process is visible here; for one on another
machine, or in another container, the heartbeat is watched. Only the standard library is needed.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from neo_megatron.errors import ConfigError
from neo_megatron.run.console import say

NAME = "run.lock"
BEAT_SECONDS = 5.0
# A file system or a process may hang for a while: only a longer silence means that the owner is dead.
SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class Owner:
    """The owner of a lock.

    Args:
        token: unique to this acquisition of the lock.
        kernel: boot id and process namespace, in which `pid` means a process; empty where unknown.
        started: when the process started, in the kernel's ticks, because process ids are reused.
        since: local time, for people.
    """

    token: str
    host: str
    pid: int
    kernel: str
    started: str
    since: str

    @classmethod
    def this_process(cls) -> "Owner":
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _kernel(), _started(pid) or "", since)

    def is_alive(self) -> bool | None:
        """Whether the owner is alive; `None` if that cannot be known from here."""
        if not self.kernel or self.kernel != _kernel():
            return None
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class OutputLock:
    """The lock on one directory; held from `acquire` to `release` by a thread that keeps it fresh.

    Args:
        directory: created if it is absent.
        beat, silence: seconds between heartbeats, and seconds of silence after which an invisible owner counts as dead.
    """

    def __init__(self, directory: str | Path, beat: float = BEAT_SECONDS, silence: float = SILENT_SECONDS) -> None:
        self.path = Path(directory) / NAME
        self._beat, self._silence = beat, silence
        self._mine: Owner | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken_by: Owner | None = None

    def acquire(self) -> None:
        """Takes the lock, or takes it over from a dead owner.

        Raises:
            ConfigError: a run that is alive holds it.
            OSError: the directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mine = Owner.this_process()
        while not self._create():
            there = self._read()
            if there is None and not self.path.exists():
                continue
            if self._is_alive(there):
                raise self._refusal(there)
            self._remove_of(there)
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep_fresh, name="output lock", daemon=True)
        self._thread.start()

    def refuse_visible(self) -> None:
        """Refuses a visible owner that is alive. Called before slow imports; changes nothing and does not wait.

        Raises:
            ConfigError: a process that can be seen from here holds the lock.
        """
        there = self._read()
        if there is not None and there.is_alive():
            raise self._refusal(there)

    def _refusal(self, there: Owner | None) -> ConfigError:
        return ConfigError(
            f"--save {self.path.parent} belongs to a run that is alive ({there or 'still starting'}): end it first, "
            "or give this one another --save and --load"
        )

    def check(self) -> None:
        """Called before anything in the directory is changed.

        Raises:
            ConfigError: another run has taken the directory over, as after this one was suspended for long.
        """
        if self._taken_by is not None:
            raise ConfigError(
                f"--save {self.path.parent} was taken over by another run ({self._taken_by}) while this one stood "
                "still: it ends here and saves nothing more"
            )

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        there = self._read()
        if there is not None and there.token == self._mine.token:
            self.path.unlink()

    def _create(self) -> bool:
        """Creates the lock file and returns whether that succeeded; with hard links it appears with its content."""
        text = json.dumps(asdict(self._mine))
        draft = self.path.with_name(f"{NAME}.{self._mine.token}")
        draft.write_text(text)
        try:
            os.link(draft, self.path)
        except FileExistsError:
            there = self._read()  # a network file system may create the link, lose the answer and retry
            return there is not None and there.token == self._mine.token
        except OSError:  # no hard links here
            try:
                with self.path.open("x") as file:
                    file.write(text)
            except FileExistsError:
                return False
        finally:
            draft.unlink()
        return True

    def _read(self) -> Owner | None:
        """The owner in the lock file; `None` if there is no lock or it is half-written."""
        try:
            return Owner(**json.loads(self.path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _is_alive(self, there: Owner | None) -> bool:
        alive = there.is_alive() if there is not None else None
        if alive is not None:
            return alive
        say(
            f"{self.path} is held by {there or 'an unknown process'}, which cannot be seen from here: "
            f"watching its heartbeat for {self._silence:.0f} s"
        )
        seen = self._last_beat()
        end = time.monotonic() + self._silence
        while time.monotonic() < end:
            time.sleep(min(self._beat / 2, self._silence / 10))
            now = self._last_beat()
            if now is None:  # released meanwhile
                return False
            if now != seen:
                return True
        return False

    def _last_beat(self) -> tuple[int, int] | None:
        """Time of the last heartbeat; the file is opened so that network file systems ask their server, not a cache."""
        try:
            with self.path.open() as file:
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _remove_of(self, dead: Owner | None) -> None:
        """Removes the lock of a dead owner, but not one that another start has put there meanwhile."""
        aside = self.path.with_name(f"{NAME}.{self._mine.token}.dead")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            try:
                moved = Owner(**json.loads(aside.read_text()))
            except (ValueError, TypeError):
                moved = None
            if moved != dead:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()
            if moved == dead:
                say(f"{self.path} was left by a run that is dead ({dead or 'unknown'}): taken over")

    def _keep_fresh(self) -> None:
        while not self._ended.wait(self._beat):
            # A failing file system does not end the run here; saving to it reports the error.
            with contextlib.suppress(OSError):
                there = self._read()
                if there is None and not self.path.exists():
                    self._create()  # somebody deleted the file
                elif there is not None and there.token == self._mine.token:
                    os.utime(self.path)
                elif there is not None:
                    self._taken_by = there
                    return


def _kernel() -> str:
    """Boot id and process namespace; empty if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in ticks; `None` for one that has ended, zombies included."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the process name before it may contain anything
    return None if state in "ZX" else fields[18]
