"""Starts and ends programs: checks paths before slow imports, and shows an error as one sentence in the last line.

    command_line.begin("evaluate", {"--model": Wanted.NEO})  # before imports that take seconds
    from neo_megatron.cli.evaluate import main
    command_line.run("evaluate", main)

Only the standard library is needed, so that Ctrl-C while libraries are loaded leaves no traceback either.
"""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from neo_megatron.errors import NeoError
from neo_megatron.packages import OPTIONAL, install
from neo_megatron.paths import Wanted, WrongPath, check_flags
from neo_megatron.redaction import redacted

INTERRUPTED = 128 + signal.SIGINT  # the exit code that a shell reports for a program ended by Ctrl-C
_LONGEST = 4000  # characters of a sentence
_ALLOCATION = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError of PyTorch
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def program_name() -> str:
    """The name in front of messages: that of a script, or `neo-megatron COMMAND`."""
    return os.path.basename(sys.argv[0]).removesuffix(".py")


def begin(name: str, flags: Mapping[str, Wanted]) -> None:
    """Checks paths, and turns errors in the slow imports that follow into sentences.

    Args:
        name: of the program, in front of messages.
        flags: the flags of the command line that take paths.
    """
    sys.excepthook = lambda kind, error, trace: _say_uncaught(name, error)
    try:
        check_flags(sys.argv[1:], flags)
    except WrongPath as wrong:
        sys.exit(f"{name}: {wrong}")


def run(name: str, main: Callable[[], Any], interrupted: str = "") -> None:
    """Runs the program.

    Args:
        name: of the program, in front of messages.
        main: its main function.
        interrupted: hint to print after Ctrl-C, such as how to continue.

    Raises:
        SystemExit: with the sentence for an error.
        Exception: for a bug, with its traceback.
    """
    try:
        try:
            main()
        except SystemExit as stop:  # also after --help
            if not stop.code:
                _flush()
            raise
        _flush()
    except KeyboardInterrupt:
        end_interrupted(name, interrupted)
    except BrokenPipeError:  # the reader of a pipe, such as head, has enough
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        sys.exit(f"{name}: {sentence}")
    finally:
        _drop_output()


def _flush() -> None:
    if sys.stdout is not None:  # None if it was closed before the start
        sys.stdout.flush()


def _drop_output() -> None:
    """Drops output that cannot be written; Python would try again at its end, and print a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # streams of tests have no descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_interrupted(name: str, hint: str = "") -> NoReturn:
    """Ends the process after Ctrl-C. Another Ctrl-C while it ends kills it, also without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # the reader of a pipe may have been interrupted too
        print(f"{name}: interrupted{hint and '; '}{hint}", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)


def sentence_of(error: BaseException) -> str | None:
    """The message of an error for the user, on one line; ``None`` for a bug, whose traceback says more."""
    sentence = _sentence_of(error)
    return sentence and _printable(redacted(sentence))


def _printable(text: str) -> str:
    """Escapes and shortens text: names in untrusted files may hold terminal commands or a million characters."""
    text = "".join(it if it.isprintable() else repr(it)[1:-1] for it in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _sentence_of(error: BaseException) -> str | None:
    if (full := _full_disk(error)) is not None:
        where = f"{full.filename} cannot be written" if full.filename else "the output cannot be written"
        return f"{where} ({full.strerror}): free space, then run the same command again"
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, MemoryError) or _ALLOCATION in str(error):
        return f"out of memory ({str(error) or 'without details'}): use a machine with more, or fewer --workers"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if getattr(error, "failures", None) and (sentence := _wrapped_sentence(error)):
        return sentence
    if isinstance(error, (NeoError, OSError)):
        return _without_worker_traceback(error)
    return None


def _full_disk(error: BaseException) -> OSError | None:
    """The full-disk error that caused an error, or that a library has wrapped in an error of its own."""
    return next((e for e in _reasons(error) if isinstance(e, OSError) and e.errno in _FULL and e.strerror), None)


def _wrapped_sentence(error: BaseException) -> str | None:
    """The message of a `NeoError` that torch.distributed.checkpoint has wrapped."""
    return next((str(reason) for reason in _reasons(error) if isinstance(reason, NeoError)), None)


def _reasons(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        waiting += [error.__cause__, error.__context__]
        failures = getattr(error, "failures", None)  # errors by rank, of torch.distributed.checkpoint
        waiting += [wrapped[0] for wrapped in failures.values()] if isinstance(failures, dict) else []


def _missing_package(error: ModuleNotFoundError) -> str | None:
    if not error.name:
        return str(error)  # raised in this package, with a remedy
    package = error.name.partition(".")[0]
    if package in ("neo_megatron", "megatron") and package != error.name:
        return None  # part of an installed package: a bug
    remedy = install(package) if package in OPTIONAL else "run pip install . in the checkout of neo_megatron"
    return f"the package {package} is not installed in {sys.executable}: {remedy}"


def _without_worker_traceback(error: BaseException) -> str:
    """The message of an error without the traceback that PyTorch's data loader adds to errors of its workers."""
    text = str(error)
    if "\nOriginal Traceback (most recent call last):\n" in text:
        text = text.rstrip().rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split("\n")).strip()


def _say_uncaught(name: str, error: BaseException) -> None:
    """Shows an error that was not caught, such as one of an import; installed as `sys.excepthook`."""
    if isinstance(error, KeyboardInterrupt):
        print(f"{name}: interrupted", file=sys.stderr)
        return
    sentence = sentence_of(error)
    if sentence is None:
        traceback.print_exception(error)
    else:
        print(f"{name}: {sentence}", file=sys.stderr)
