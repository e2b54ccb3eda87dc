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
from neo_megatron.run.start import OWN_STORE, PROGRAM, check_paths, log_file

_TRAINING = "neo_megatron.pretrain_neo"


def main() -> None:
    """Checks paths and runs the launcher; exits with the message of the first failure."""
    try:
        if _TRAINING in sys.argv:
            check_paths(sys.argv[sys.argv.index(_TRAINING) + 1 :])
        _launch()
    except KeyboardInterrupt:
        end_interrupted(PROGRAM)
    except ValueError as error:  # a path, a preset, a rendezvous
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
    restarts = _Restarts()
    for name, level in restarts.LOGGERS.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [restarts], False
        logger.setLevel(level)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which warns of it
    args = run.parse_args(None)
    fewest, most = run.parse_min_max_nnodes(args.nnodes)  # torchrun's default is 1:1
    if args.max_restarts or fewest < most:
        if args.rdzv_backend == "static" and not args.standalone:
            raise ValueError(
                "--max-restarts and --nnodes MIN:MAX need a rendezvous that starts again: give --standalone on one "
                "machine, or --rdzv-backend c10d --rdzv-endpoint HOST:PORT in place of --master-addr and --master-port"
            )
        os.environ.setdefault(OWN_STORE, "1")
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


class _Restarts(logging.Handler):
    """Prints one line before torchrun starts all ranks again, from its own records of the failure and the restart."""

    LOGGERS = {
        "torch.distributed.elastic.multiprocessing.api": logging.ERROR,
        "torch.distributed.elastic.agent.server.api": logging.INFO,
    }

    def __init__(self) -> None:
        super().__init__()
        self._failed = "a rank of another machine failed"

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record of torchrun."""
        arguments: tuple[Any, ...] = record.args if isinstance(record.args, tuple) else ()
        if record.msg.startswith("failed (exitcode: "):
            code, local_rank = arguments[:2]
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            self._failed = f"local rank {local_rank} {how}"
        elif "attempts left;" in record.msg:
            self._say(f"{self._failed}; starting all ranks again ({arguments[2]} of {arguments[3]} restarts are left)")
        elif "new nodes from group_rank" in record.msg:
            self._say("another machine joins; starting all ranks again")

    @staticmethod
    def _say(text: str) -> None:
        print(f"{PROGRAM}: {text}", flush=True)


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
