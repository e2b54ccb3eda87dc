"""Starts the ranks of a training run on this machine, like `torchrun` and with its flags, but ends with one message.

    python -m neo_megatron.launch --nproc-per-node 8 -m neo_megatron.pretrain_neo --neo-model neo-2b ...

torchrun ends with a report on all ranks and its own traceback; this ends with the message of the rank that failed
first. Mistyped paths are found before anything is started.
"""

import logging
import os
import signal
import sys
from argparse import ArgumentParser
from typing import Any

from neo_megatron.command_line import INTERRUPTED, end_interrupted, sentence_of
from neo_megatron.run.start import PROGRAM, check_paths, log_file

_TRAINING = "neo_megatron.pretrain_neo"


def main() -> None:
    """Checks paths and runs the launcher; exits with the message of the first failure."""
    try:
        if _TRAINING in sys.argv:
            check_paths(sys.argv[sys.argv.index(_TRAINING) + 1 :])
        _launch()
    except KeyboardInterrupt:
        end_interrupted(PROGRAM)
    except ValueError as error:  # a path, a preset
        sys.exit(f"{PROGRAM}: {error}")
    except ModuleNotFoundError as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        sys.exit(f"{PROGRAM}: {sentence}")


def _launch() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they report at length what is reported below
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which warns of it
    args = run.parse_args(None)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        killed = [(r, f) for r, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
        if killed:  # the others failed because it was killed
            rank, failure = killed[0]
        if failure.exitcode == INTERRUPTED:
            end_interrupted(PROGRAM)
        sys.exit(describe(rank, failure, sys.argv))
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            end_interrupted(PROGRAM)
        print(f"{PROGRAM}: ended by {error.sigval.name}", file=sys.stderr)
        sys.exit(128 + error.sigval)


def describe(rank: int, failure: Any, arguments: list[str]) -> str:
    """The message about the rank that failed first.

    Args:
        rank: its global rank.
        failure: torch's `ProcessFailure`.
        arguments: of the command line, to find the log.
    """
    message = failure.message
    if isinstance(message, str) and message.startswith(f"{PROGRAM}: "):
        return message
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save")
    save = parser.parse_known_args(arguments)[0].save
    log = f"; its log is {log_file(save, rank)}" if save else ""
    if failure.exitcode < 0:
        memory = ", as the system does when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return f"{PROGRAM}: rank {rank} was ended by {failure.signal_name()}{memory}{log}"
    what = message.get("message", "") if isinstance(message, dict) else ""
    return f"{PROGRAM}: rank {rank} failed with exit code {failure.exitcode}{what and ': '}{what}{log}"


if __name__ == "__main__":
    main()
