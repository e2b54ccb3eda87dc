"""Runs parts of the GPU benchmark in processes of their own: a failure is a row, and memory is freed for the next one.

The next process already imports what it needs while one measures; it uses the GPU only in its turn.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from neo_megatron.processes import SPAWN


@dataclass(frozen=True)
class Job:
    """One process.

    Args:
        name: on the screen, and of its log.
        prepare: imports what is slow to import, and touches no GPU.
        run: ``run(report, **settings)`` gives ``report`` a dictionary of plain values for everything it has measured.
    """

    name: str
    prepare: Callable[[], None]
    run: Callable[..., None]
    settings: dict[str, Any]


def run_jobs(jobs: Iterable[Job], logs: Path) -> Iterator[tuple[Job, list[dict[str, Any]]]]:
    """Each job with its reports, in their order; ``{"failed": sentence}`` comes last if its process ended early.

    A job may be followed by others that depend on its reports: the iterable is asked for one job ahead only.
    """
    waiting = iter(jobs)
    following = _start(next(waiting, None), logs)
    while following is not None:
        current, following = following, _start(next(waiting, None), logs)
        try:
            yield current.job, list(current.reports())
        except BaseException:
            if following is not None:
                following.process.kill()
            raise


class _Process:
    def __init__(self, job: Job, logs: Path) -> None:
        self.job, self.log = job, logs / f"{job.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.connection, there = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_work, args=(job, there, self.log), daemon=True)
        self.process.start()
        there.close()

    def reports(self) -> Iterator[dict[str, Any]]:
        try:
            self.connection.send("go")
            while (report := self.connection.recv()) is not None:
                yield report
        except (EOFError, OSError):
            yield {"failed": f"{_last_error(self.log)} (log: {self.log.name})"}
        finally:
            self.process.kill()
            self.process.join()


def _start(job: Job | None, logs: Path) -> _Process | None:
    return None if job is None else _Process(job, logs)


def _work(job: Job, connection: Connection, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    job.prepare()
    connection.recv()
    job.run(connection.send, **job.settings)
    connection.send(None)


def _last_error(log: Path) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    plain = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines]  # so they end where processes have ranks
    errors = [line for line in plain if re.match(r"[\w.]*(Error|Exception)\b|pretrain_neo: ", line)]
    return (errors or plain or ["no output"])[-1][:300]
