"""Ends a rank after an error, so that the error is printed once, and last.

torchrun gives every rank a file for its error. The first rank that fails on a machine claims a file next to these
and reports its error; the others, which fail for the same reason or because the first one is gone, wait to be ended. A
rank that hangs, because a rank that it exchanges tensors with is gone, ends by itself.
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
from pathlib import Path
from typing import NoReturn

from neo_megatron.command_line import INTERRUPTED
from neo_megatron.redaction import redacted
from neo_megatron.run.console import Console

_CLAIM = "first-failure"
_SECONDS_TO_BE_ENDED = 15  # by torchrun or srun
_SECONDS_BEHIND_KILLED = 6  # a busy machine takes that long to see it
_SECONDS_BEHIND_RANK_0 = 5  # where nobody else says which rank failed first


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
        if self._error_file is not None:
            self._write_error_file(text if sentence else None, error)
        if self._error_file is None or not sentence:
            self._show(text)
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
        return True

    @property
    def _claim(self) -> Path:
        return self._error_file.parents[1] / _CLAIM

    def _wait_to_be_ended(self) -> NoReturn:
        _be_endable()
        time.sleep(_SECONDS_TO_BE_ENDED)
        self._end(1)

    def _leave_after_another(self) -> None:
        while not self._claim.exists():
            time.sleep(1)
        time.sleep(_SECONDS_TO_BE_ENDED // 3)  # first torchrun sees which rank failed
        self._end(1)

    def _write_error_file(self, sentence: str | None, error: BaseException) -> None:
        """Writes torch's error file: a sentence is shown as text, a call stack as a bug."""
        now = str(int(time.time()))
        stack = "".join(traceback.format_exception(error))
        bug = {"message": f"{type(error).__name__}: {error}", "extraInfo": {"py_callstack": stack, "timestamp": now}}
        written = {"message": sentence, "timestamp": now} if sentence else {"message": bug}
        self._error_file.write_text(json.dumps(written))

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


def _was_told_to_end() -> bool:
    """Whether SIGTERM arrived while Megatron's handler was installed, which only records it."""
    variables = sys.modules.get("megatron.training.global_vars")
    handler = variables and variables._GLOBAL_SIGNAL_HANDLER
    return handler is not None and handler._signal_received


def _be_endable() -> None:
    """Kills child processes, which would outlive this one, and lets SIGTERM end it; Megatron would save first."""
    for child in multiprocessing.active_children():
        child.kill()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
