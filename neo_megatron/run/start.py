"""The start of `python -m neo_megatron.pretrain_neo`: paths are checked and the log is opened before slow imports."""

import os
import socket
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from neo_megatron import presets
from neo_megatron.command_line import sentence_of
from neo_megatron.model.config import ConfigError
from neo_megatron.paths import Wanted, check_flags
from neo_megatron.run.console import Console, ShortLines
from neo_megatron.run.failure import Failure

PROGRAM = "pretrain_neo"
PATHS = {
    "--train-data-path": Wanted.PACKS,
    "--valid-data-path": Wanted.PACKS,
    "--test-data-path": Wanted.PACKS,
    "--pretrained-checkpoint": Wanted.START,
    "--load": Wanted.RUN,
    "--neo-model": Wanted.SIZES,
    "--save": Wanted.OUTPUT,
    "--tensorboard-dir": Wanted.OUTPUT,
}


def start() -> None:
    """Trains, and ends the process with a sentence where the user can put right what is wrong."""
    failure = Failure(PROGRAM)
    try:
        check_paths(sys.argv[1:])
        failure.console = open_console(sys.argv[1:])
        failure.watch()
        stand_alone()
        from neo_megatron import pretrain_neo

        pretrain_neo.main()
    except KeyboardInterrupt:
        failure.interrupted()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            failure.tell(stop, stop.code.removeprefix(f"{PROGRAM}: "))
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        failure.tell(error, sentence_of(error, ConfigError))


def stand_alone() -> None:
    """What a launcher tells each rank, for one process that was started by itself."""
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)


def check_paths(arguments: Sequence[str]) -> None:
    """Raises WrongPath or ConfigError for a path of a command line that cannot be what its flag takes."""
    check_flags(arguments, PATHS)
    given = _parse(arguments)
    if given.neo_model and not Path(given.neo_model).exists():
        presets.sizes(given.neo_model)


def open_console(arguments: Sequence[str]) -> Console | None:
    """The log in ``--save``; ``None`` where all is printed: without ``--save``, or where it is asked for."""
    given = _parse(arguments)
    if not given.save or given.console_log == "full" or given.dry_run or given.help:
        return None
    rank = int(os.environ.get("RANK", "0"))
    console = Console(log_file(given.save, rank), ShortLines(warnings=rank == 0))
    if rank == 0:
        console.show(f"starting, which takes some seconds; the full log of every rank is in {console.log.parent}")
    return console


def log_file(save: str | Path, rank: int) -> Path:
    """Where a rank of the run that saves there logs, in every one of its starts."""
    return Path(save) / "logs" / f"rank_{rank:05d}.log"


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--save", "--neo-model", "--console-log"):
        parser.add_argument(flag)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_known_args(arguments)[0]
