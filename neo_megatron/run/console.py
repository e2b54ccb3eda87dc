"""The console of a training: short lines on the screen, all output in a log file.

A process prints through Python, through `logging` and from C++ libraries. All of it goes straight into a file, by file
descriptor, so that nothing is lost however the process ends. Output of Python is also read line by line, and lines that
matter are shown on the screen in short form.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_ITERATION = re.compile(r" \[[^]]*\] iteration +(\d+)/ *(\d+) \|(.*)")
_VALIDATION = re.compile(r" (validation|test) loss at iteration (\d+)(?: on (\w+) set)?.*? \| lm loss value: ([^ ]+)")
_SAVED = re.compile(r" *\[[^]]*\] successfully saved checkpoint from iteration +(\d+) to (.*?)(?: \[.*)?")
# Iteration 0 is a new run, possibly from another run's checkpoint; `RunCheckpoints` prints from which.
_LOADED = re.compile(r" *successfully loaded checkpoint from (.*?)(?: \[.*\])? at iteration ([1-9]\d*)")
_STAGE = re.compile(r"(training stage \d+, pipeline stage \d+): trainable parameters on this rank:")
_TRAINABLE = re.compile(r" *([\d,]+) of +([\d,]+)  all")
_OURS = re.compile(r"attention tiles: |broken sample|.*exiting program |.*scheduled an async checkpoint save ")
# Megatron warns of its own plans and of packages that NEO does not use, in every run.
_WARNING = re.compile(r"WARNING(?!.*(?:rerun_state_machine|one_logger|is deprecated))[: ]")
# Megatron's name of a quantity of a step -> its name in the short line.
_QUANTITIES = {
    "lm loss": "loss",
    "loss by modality": "loss by modality",
    "grad norm": "grad norm",
    "learning rate": "lr",
    "throughput per GPU (TFLOP/s/GPU)": "TFLOP/s/GPU",
    "tokens per second per GPU": "tokens/s/GPU",
    "MFU (%)": "MFU %",
    "elapsed time per iteration (ms)": "ms",
    "samples with a broken image": "broken samples",
    "steps without loss weight": "steps without loss weight",
    "number of skipped iterations": "skipped",
    "number of nan iterations": "nan",
}


class ShortLines:
    """Shortens the lines that matter and drops all others.

    Args:
        warnings: whether to show warnings, each once; only one rank does, because all print the same ones.
    """

    def __init__(self, warnings: bool) -> None:
        self._warnings = warnings
        self._warned: set[str] = set()
        self._stage = ""

    def __call__(self, line: str) -> str | None:
        """The short line, or ``None``."""
        if match := _ITERATION.fullmatch(line):
            return f"iteration {match[1]}/{match[2]}{_quantities(match[3])}"
        if match := _VALIDATION.match(line):
            return f"iteration {match[2]} | {match[3] or match[1]} loss {match[4]}"
        if match := _SAVED.fullmatch(line):
            return f"iteration {match[1]} | checkpoint saved to {match[2]}"
        if match := _LOADED.fullmatch(line):
            return f"checkpoint of iteration {match[2]} loaded from {match[1]}"
        if match := _STAGE.fullmatch(line):
            self._stage = match[1]
            return None
        if self._stage and (match := _TRAINABLE.fullmatch(line)):
            return f"{self._stage}: {match[1]} of {match[2]} parameters of this rank train"
        if _OURS.match(line):
            return line.strip()
        if self._warnings and _WARNING.match(line) and line not in self._warned:
            self._warned.add(line)
            return line.strip()
        return None


def _quantities(text: str) -> str:
    """`` | loss 2.31 | lr 5e-04`` of the rest of Megatron's line of a step."""
    values = dict(part.strip().rsplit(":", 1) for part in text.split("|") if ":" in part)
    shown = {}
    for name, short in _QUANTITIES.items():
        value = values.get(name, "").strip()
        if value and not (short in ("skipped", "nan", "broken samples") and value == "0"):
            shown[short] = f"{float(value):g}" if re.fullmatch(r"[-+\d.eE]+", value) else value
    return "".join(f" | {value} {short}" if short == "ms" else f" | {short} {value}" for short, value in shown.items())


class _Lines:
    """A text stream that passes on what is written and calls a function for every complete line."""

    def __init__(self, stream: TextIO, console: "Console") -> None:
        self._stream, self._console = stream, console
        self._begun = ""

    def say(self, text: str) -> None:
        self._pass_on(f"{text}\n")
        self._console.show(text)

    def write(self, text: str) -> int:
        self._pass_on(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._console.look_at(line.rpartition("\r")[2])
        self._begun = self._begun.rpartition("\r")[2]
        return len(text)

    def _pass_on(self, text: str) -> None:
        try:
            self._stream.write(text)
        except OSError as error:  # a full disk stops a save, not a message
            self._console.cannot_log(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._console.cannot_log(error)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """Prints a message of the run to the log and, unshortened, to the screen."""
    if isinstance(sys.stdout, _Lines):
        sys.stdout.say(text)
    else:
        print(text, flush=True)


class Console:
    """Sends all output of this process, and of processes that it starts, to a file from now on.

    Args:
        log: is appended to, so that a resumed run keeps its earlier log.
        short: line -> what to show of it.
    """

    def __init__(self, log: Path, short: Callable[[str], str | None]) -> None:
        self.log = log
        self._short = short
        self._log_failed = False
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._screen: int | None = os.dup(1)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        for stream in (sys.stdout, sys.stderr):
            # Otherwise Python buffers output to a file, and a kill loses it.
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stdout = _Lines(sys.stdout, self)
        sys.stderr = _Lines(sys.stderr, self)
        print(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {' '.join(sys.argv)}", flush=True)

    def show(self, text: str) -> None:
        """Shows text on the screen only; does nothing once the screen is gone, as after ``| head``."""
        if self._screen is None:
            return
        try:
            os.write(self._screen, f"{text}\n".encode(errors="backslashreplace"))
        except OSError:
            self._screen = None

    def look_at(self, line: str) -> None:
        """Shows a line of the log in short form if it matters."""
        text = self._short(line)
        if text is not None:
            self.show(text)

    def cannot_log(self, error: OSError) -> None:
        """Reports once that the log can no longer be written."""
        if not self._log_failed:
            self._log_failed = True
            self.show(f"{self.log} cannot be written ({error.strerror}): training continues without it")
