"""Prepares a run before its slow imports: finds the rank, checks paths, opens the log."""

import os
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.errors import ConfigError
from neo_megatron.paths import Wanted, check_flags
from neo_megatron.run.console import Console, ShortLines
from neo_megatron.run.output_lock import OutputLock

PROGRAM = "pretrain_neo"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Without it torchrun gives every start the same store, in which ranks find the addresses of those that have ended.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
PATHS = {
    "--train-data-path": Wanted.PACKS,
    "--mixture": Wanted.MIXTURE,
    "--valid-data-path": Wanted.PACKS,
    "--test-data-path": Wanted.PACKS,
    "--pretrained-checkpoint": Wanted.START,
    "--load": Wanted.RUN,
    "--neo-model": Wanted.SIZES,
    "--save": Wanted.OUTPUT,
    "--tensorboard-dir": Wanted.OUTPUT,
    "--mlflow-dir": Wanted.OUTPUT,
}


def stand_alone(arguments: Sequence[str]) -> None:
    """Sets the variables of a launcher if there is none: a process that was started by itself trains alone.

    Args:
        arguments: of the command line. With ``--dry-run`` one process checks for all ranks, and needs no address.

    Raises:
        ConfigError: this is one of several processes, and its rank or the address of the others is missing.
    """
    rank, ranks = _number("RANK"), _number("WORLD_SIZE")
    if ranks is None and not rank:
        if (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
            raise ConfigError(
                f"srun has started {tasks} processes, and each would train alone because WORLD_SIZE is not set: start "
                "them with examples/slurm.sbatch, which sets RANK, WORLD_SIZE and LOCAL_RANK"
            )
        for name in LAUNCHER_VARIABLES:  # an address left in the environment belongs to another run
            os.environ.pop(name, None)
        ranks = 1
    if ranks == 1 and not rank:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    elif ranks is not None and "--dry-run" in arguments:
        os.environ.setdefault("RANK", "0")
    elif missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
        given = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
        raise ConfigError(
            f"{' and '.join(given)} says that this is one of several processes, but there is no {', '.join(missing)}: "
            "start them with python -m neo_megatron.launch --nproc-per-node N, which sets all five, or unset RANK and "
            "WORLD_SIZE to train on one process"
        )
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ.get(OWN_STORE) != "1":
        raise ConfigError(
            "torchrun has started the ranks again with the store of those that have ended, and they would wait for "
            f"these: start with python -m neo_megatron.launch in place of torchrun, or with {OWN_STORE}=1"
        )
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= ranks:
        raise ConfigError(f"RANK={rank} is not one of the WORLD_SIZE={ranks} processes: they are counted from 0")


def _number(variable: str) -> int | None:
    """An environment variable that counts processes; `None` if it is unset or empty."""
    text = os.environ.get(variable, "")
    if not text:
        os.environ.pop(variable, None)
        return None
    if not text.isdecimal():
        raise ConfigError(
            f"{variable}={text} is not a number of processes: unset it, or start with neo_megatron.launch"
        )
    return int(text)


def check_paths(arguments: Sequence[str]) -> None:
    """Raises WrongPath or ConfigError for a path that its flag cannot take, or that another run uses."""
    check_flags(arguments, PATHS)
    given = _parse(arguments)
    if given.neo_model and not Path(given.neo_model).exists():
        sizes_of(given.neo_model)
    if given.save and not given.dry_run and not given.help:
        OutputLock(given.save).refuse_visible()


def open_console(arguments: Sequence[str]) -> Console | None:
    """The log in ``--save``; ``None`` if all output goes to the screen: without ``--save``, or on request."""
    given = _parse(arguments)
    if not given.save or given.console_log == "full" or given.dry_run or given.help:
        return None
    rank = int(os.environ.get("RANK", "0"))
    console = Console(log_file(given.save, rank), ShortLines(warnings=rank == 0))
    if rank == 0:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        again = f" (restart {restart} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS')})" if restart != "0" else ""
        told = f"starting{again}, which takes some seconds; the full log of every rank is in {console.log.parent}"
        console.show(told)
    return console


def log_file(save: str | Path, rank: int) -> Path:
    """The log file of a rank, in the directory that its run saves to; every start appends to it."""
    return Path(save) / "logs" / f"rank_{rank:05d}.log"


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--save", "--neo-model", "--console-log"):
        parser.add_argument(flag)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_known_args(arguments)[0]
