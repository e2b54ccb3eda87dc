"""The training step on one CPU thread, against a plain loop over the exported model that trains the same weights."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from neo_megatron.benchmarks import train_ours, train_plain
from neo_megatron.benchmarks.table import Row
from neo_megatron.benchmarks.train_inputs import LENGTH, write_inputs
from neo_megatron.benchmarks.train_step import BY_DATA_SET, Step
from neo_megatron.processes import SPAWN

VOCABULARIES = {1024: ">= 1.3", 32768: ">= 1.8"}
WARM_UP, STEPS = 2, 9
# Tolerance of the losses of two implementations over eleven steps of AdamW in float32.
TOLERANCE = 1e-4
LOG = "train.log"


def measure(scratch: Path) -> list[Row]:
    """Time and memory of a training step, next to a plain loop over the exported model."""
    rows = []
    for vocabulary, target in VOCABULARIES.items():
        inputs = write_inputs(scratch / "train", vocabulary)
        for recompute in (False, True):
            what = f"training, vocabulary {vocabulary:,}, recomputation {'on' if recompute else 'off'}"
            ours, plain = take_turns(inputs, vocabulary, recompute)
            rows += _rows(what, ours, plain, target)
    return rows


def take_turns(inputs: Path, vocabulary: int, recompute: bool) -> tuple[list[Step], list[Step]]:
    """Our steps and the plain ones. Each side has a process of its own, and they take turns.

    Raises:
        RuntimeError: a side has failed, or their losses differ, so that they do not do the same work.
    """
    with ExitStack() as stack:
        sides = [
            stack.enter_context(worker(side.run, inputs, vocabulary, recompute)) for side in (train_ours, train_plain)
        ]
        steps: list[list[Step]] = [[], []]
        for number in range(WARM_UP + STEPS):
            for side, done in zip(sides, steps, strict=True):
                side.send(True)
                done.append(answer(side, inputs))
            ours, plain = (done[-1].loss for done in steps)
            if abs(ours - plain) > TOLERANCE * plain:
                raise RuntimeError(f"step {number + 1}: our loss is {ours}, the plain loop's {plain}")
    return steps[0][WARM_UP:], steps[1][WARM_UP:]


def answer(side: Connection, inputs: Path) -> Step:
    """The result of the step that a side was asked for."""
    try:
        return side.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RuntimeError(f"a side of the benchmark has failed; see {inputs / LOG}") from error


def _rows(what: str, ours: Sequence[Step], plain: Sequence[Step], target: str) -> list[Row]:
    def both(unit: str, of: Callable[[Sequence[Step]], float], name: str = "", target: str = "") -> Row:
        return Row(f"{what}{name}", unit, of(ours), of(plain), "plain loop", target)

    def part(*names: str) -> Callable[[Sequence[Step]], float]:
        return lambda steps: 1000 * median(sum(step.parts.get(name, 0.0) for name in names) for step in steps)

    speed = both("tokens per CPU-second", lambda steps: LENGTH / median(step.seconds for step in steps), "", target)
    memory = both("MB", lambda steps: max(step.memory for step in steps) / 1e6, ": peak memory")
    passes = both("ms", part("forward", "backward"), ": forward and backward")
    optimizer = both("ms", part("optimizer"), ": clipping and AdamW")
    alone = [
        Row(f"{what}: {name}", "ms", part(key)(ours))
        for name, key in (("Megatron's loop", "Megatron's loop"), ("reading the pack", "data"))
    ]
    complete = 1000 * median(step.seconds for step in ours)
    looking = Row(f"{what}: {BY_DATA_SET}", "ms", part(BY_DATA_SET)(ours), complete, "the step", "<= 0.01")
    return [speed, memory, passes, optimizer, looking, *alone]


@contextmanager
def worker(run: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A new process, whose output goes to `LOG` next to its inputs."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_run_silently, args=(run, there, *arguments))
    process.start()
    there.close()
    try:
        yield here
        here.send(False)
        process.join()
    finally:
        process.kill()


def _run_silently(run: Callable[..., None], connection: Connection, inputs: Path, *arguments: object) -> None:
    log = os.open(inputs / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    run(connection, inputs, *arguments)
