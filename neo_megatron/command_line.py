"""How a program begins and ends: path mistakes are found first, and an error is the last line and only a sentence.

    command_line.begin("evaluate", {"--model": Wanted.NEO})  # before imports that take seconds
    from neo_megatron.cli.evaluate import main
    command_line.run("evaluate", main)

Needs nothing but the standard library, so that Ctrl-C while libraries are loaded leaves no traceback either.
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

INTERRUPTED = 128 + signal.SIGINT  # what a shell says of a program that Ctrl-C has ended
_LONGEST = 4000
_ALLOCATION = "DefaultCPUAllocator: can't allocate memory"  # of PyTorch, a RuntimeError
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def program_name() -> str:
    """What stands in front of a sentence: the name of a script, or `neo-megatron COMMAND`."""
    return os.path.basename(sys.argv[0]).removesuffix(".py")


def begin(name: str, flags: Mapping[str, Wanted]) -> None:
    """To be called before slow imports: checks paths, and turns what goes wrong in these imports into a sentence.

    Args:
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
        interrupted: what to say after Ctrl-C, such as how to continue.

    Raises:
        SystemExit: with the sentence.
        Exception: what is a bug, with its traceback.
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
    if sys.stdout is not None:  # as it is where it was closed before the start
        sys.stdout.flush()


def _drop_output() -> None:
    """What cannot be written any more would be tried again at the end of Python, and leave its own traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_interrupted(name: str, hint: str = "") -> NoReturn:
    """Ends the process as after Ctrl-C. Another Ctrl-C while it ends kills it, without a traceback either."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # a pipe whose reader has been interrupted, too
        print(f"{name}: interrupted{hint and '; '}{hint}", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)


def sentence_of(error: BaseException) -> str | None:
    """What to tell the user of an error, on one line; ``None`` for a bug, of which the traceback tells more."""
    sentence = _sentence_of(error)
    return sentence and _printable(redacted(sentence))


def _printable(text: str) -> str:
    """Names in files of others may hold anything: commands to a terminal, or a million characters."""
    text = "".join(it if it.isprintable() else repr(it)[1:-1] for it in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _sentence_of(error: BaseException) -> str | None:
    if (full := _full_disk(error)) is not None:
        where = f"{full.filename} cannot be written" if full.filename else "the output cannot be written"
        return f"{where} ({full.strerror}): free space, then run the same command again"
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, MemoryError) or _ALLOCATION in str(error):
        return f"out of memory ({str(error) or 'no more is given'}): use a machine with more, or fewer --workers"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if getattr(error, "failures", None) and (told := _told(error)):
        return told
    if isinstance(error, (NeoError, OSError)):
        return _without_worker_traceback(error)
    return None


def _full_disk(error: BaseException) -> OSError | None:
    """The error of a full disk that is the reason of an error, or that a library has wrapped in one of its own."""
    return next((e for e in _reasons(error) if isinstance(e, OSError) and e.errno in _FULL and e.strerror), None)


def _told(error: BaseException) -> str | None:
    """The sentence of an error of ours that torch.distributed.checkpoint has wrapped."""
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
        failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint, by rank
        waiting += [wrapped[0] for wrapped in failures.values()] if isinstance(failures, dict) else []


def _missing_package(error: ModuleNotFoundError) -> str | None:
    if not error.name:
        return str(error)  # raised by us, with a remedy
    package = error.name.partition(".")[0]
    if package in ("neo_megatron", "megatron") and package != error.name:
        return None  # a part of a package that is there
    remedy = install(package) if package in OPTIONAL else "run pip install . in the checkout of neo_megatron"
    return f"the package {package} is not installed in {sys.executable}: {remedy}"


def _without_worker_traceback(error: BaseException) -> str:
    """PyTorch's data loader puts the traceback of its worker into the text of the error."""
    text = str(error)
    if "\nOriginal Traceback (most recent call last):\n" in text:
        text = text.rstrip().rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split("\n")).strip()


def _say_uncaught(name: str, error: BaseException) -> None:
    """What Python calls for an error that nobody has caught, as in an import."""
    if isinstance(error, KeyboardInterrupt):
        print(f"{name}: interrupted", file=sys.stderr)
        return
    sentence = sentence_of(error)
    if sentence is None:
        traceback.print_exception(error)
    else:
        print(f"{name}: {sentence}", file=sys.stderr)
