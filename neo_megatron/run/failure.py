"""Ends a rank after an error, so that the error is printed once, and last.

torchrun gives every rank a file for its error. The first rank that fails on a machine claims a file next to these
and reports its error; the others, which fail for the same reason or because the first one is gone, wait to be ended. A
rank that hangs, because a rank that it exchanges tensors with is gone, ends by itself. Other machines read the error in
the ranks' store and report it as their own; NCCL alone would let them wait for --distributed-timeout-minutes.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from neo_megatron.command_line import INTERRUPTED
from neo_megatron.redaction import redacted
from neo_megatron.run.console import Console

_CLAIM = "first-failure"
_SECONDS_TO_BE_ENDED = 15  # by torchrun or srun
_SECONDS_BEHIND_KILLED = 6  # a busy machine takes that long to see it
_SECONDS_BEHIND_RANK_0 = 5  # where nobody else says which rank failed first
_SECONDS_BETWEEN_LOOKS = 5  # of one rank of a machine into torchrun's store
_SECONDS_BETWEEN_QUESTIONS = 0.5  # whether all machines know
_SECONDS_TO_BE_SEEN = 12  # by other machines; the store may be gone once this rank has ended


class Failure:
    """The end of this rank.

    Args:
        name: of the program, in front of its sentences.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rank = int(os.environ.get("RANK", "0"))
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._error_file = Path(file) if file else None
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        self._told = _ToldToMachines(machines) if self._error_file is not None and machines > 1 else None
        self._patience = _SECONDS_TO_BE_SEEN if self._told is not None else 0  # the first rank may take that long
        self._claimed = False
        self.console: Console | None = None

    def watch(self) -> None:
        """Ends this rank when another one has failed, even if it hangs."""
        if self._error_file is not None:
            threading.Thread(target=self._leave_after_another, daemon=True).start()

    def tell(self, error: BaseException, sentence: str | None) -> NoReturn:
        """Ends the process after an error.

        Args:
            sentence: message for the user; without one the traceback is shown.
        """
        text = f"{self._name}: {sentence}" if sentence else "".join(traceback.format_exception(error)).rstrip()
        text = redacted(text)
        if self.console is not None:
            print(text, file=sys.stderr)  # into the log
        if not sentence and self._error_file is not None:
            # Perhaps only because another rank was killed: torchrun reports that better, and ends this rank.
            _be_endable()
            if _was_told_to_end():
                self._end(1)
            time.sleep(_SECONDS_BEHIND_KILLED)
        if not self._is_first():
            self._wait_to_be_ended()
        if self._told is not None:
            _be_endable()
            short = f"{self._name}: rank {self._rank} failed: {type(error).__name__}: {error}"
            first = self._told.tell(text if sentence else redacted(short))
            if first is not None:
                self._end_for_another(first)
        if self._error_file is not None:
            self._write_error_file(text if sentence else None, error)
        if self._error_file is None or not sentence or _restarts_left():
            self._show(text)  # the launcher shows the sentence of the last start alone
        self._end(1)

    def interrupted(self) -> NoReturn:
        """Ends the process after Ctrl-C, which all ranks and the launcher get; the launcher reports it."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._error_file is None and self._rank == 0:
            self._show(f"{self._name}: interrupted")
        self._end(INTERRUPTED)

    def _is_first(self) -> bool:
        if self._error_file is None:
            if self._rank:
                _be_endable()
                time.sleep(_SECONDS_BEHIND_RANK_0)
            return True
        try:
            self._claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        self._claimed = True
        return True

    @property
    def _claim(self) -> Path:
        return self._error_file.parents[1] / _CLAIM

    def _wait_to_be_ended(self) -> NoReturn:
        _be_endable()
        time.sleep(_SECONDS_TO_BE_ENDED + self._patience)
        self._end(1)

    def _leave_after_another(self) -> None:
        told = self._told if os.environ.get("LOCAL_RANK") == "0" else None
        looked = time.monotonic()
        while not self._claim.exists():
            time.sleep(1)
            if told is not None and time.monotonic() - looked >= _SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                if (text := told.look()) and self._is_first():
                    time.sleep(_SECONDS_BETWEEN_QUESTIONS + 1)  # the store may end with this machine
                    self._end_for_another(text)
        time.sleep(_SECONDS_TO_BE_ENDED // 3 + self._patience)  # first torchrun sees which rank failed
        if not self._claimed:  # by the main thread, which reports its error
            self._end(1)

    def _end_for_another(self, text: str) -> NoReturn:
        """Reports the error of a rank of another machine."""
        self._error_file.write_text(json.dumps(_message(text)))
        self._end(1)

    def _write_error_file(self, sentence: str | None, error: BaseException) -> None:
        """Writes torch's error file: a sentence is shown as text, a call stack as a bug."""
        stack = "".join(traceback.format_exception(error))
        message = _message(sentence or "")
        bug = {"py_callstack": stack, "timestamp": message["timestamp"]}
        if not sentence:
            message = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": bug}}
        self._error_file.write_text(json.dumps(message))

    def _show(self, text: str) -> None:
        if self.console is not None:
            self.console.show(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _end(self, code: int) -> NoReturn:
        """Ends the process without Python's shutdown, which may wait for ranks that are gone."""
        for child in multiprocessing.active_children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed screen or a full disk
                stream.flush()
        os._exit(code)


class _ToldToMachines:
    """The error of the rank that failed first, in the store of the process group, which outlives the group.

    It is torchrun's, or, where ranks may be started again, that of rank 0.

    Args:
        machines: how many there are.
    """

    def __init__(self, machines: int) -> None:
        self._machines = machines
        self._key = "neo_megatron/first-failure"
        self._store: Any = None

    def tell(self, text: str) -> str | None:
        """Tells the other machines and waits until they know; the error of another machine, if it was first."""
        try:
            store = self._connected()
            first = store.compare_set(self._key, "", text).decode()
            if first != text:
                store.add(f"{self._key}/seen", 1)
                return first
            deadline = time.monotonic() + _SECONDS_TO_BE_SEEN
            while store.add(f"{self._key}/seen", 0) < self._machines - 1 and time.monotonic() < deadline:
                time.sleep(_SECONDS_BETWEEN_QUESTIONS)
        except (RuntimeError, OSError, ImportError):
            pass  # the store is gone, and so is the machine that failed first; this one's error is still reported
        return None

    def look(self) -> str | None:
        """The error of another machine."""
        if not hasattr(sys.modules.get("torch.distributed"), "TCPStore"):
            return None  # the main thread prepares the import of torch
        try:
            store = self._connected()
            if not store.check([self._key]):
                return None
            store.add(f"{self._key}/seen", 1)
            return store.get(self._key).decode()
        except (RuntimeError, OSError):
            return None  # the store's machine is about to end, or busy

    def _connected(self) -> Any:
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=_SECONDS_TO_BE_SEEN),
                wait_for_workers=False,
            )
        return self._store


def _message(text: str) -> dict[str, Any]:
    """The content of torch's error file for a sentence."""
    return {"message": text, "timestamp": str(int(time.time()))}


def _restarts_left() -> bool:
    """Whether torchrun starts all ranks again when this one has failed."""
    count, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return count < most


def _was_told_to_end() -> bool:
    """Whether SIGTERM arrived while Megatron's handler was installed, which only records it."""
    variables = sys.modules.get("megatron.training.global_vars")
    handler = variables and variables._GLOBAL_SIGNAL_HANDLER
    return handler is not None and handler._signal_received


def _be_endable() -> None:
    """Kills child processes, which would outlive this one, and lets SIGTERM end it; Megatron would save first."""
    for child in multiprocessing.active_children():
        child.kill()
    if threading.current_thread() is threading.main_thread():  # which hangs otherwise: torchrun follows with SIGKILL
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
