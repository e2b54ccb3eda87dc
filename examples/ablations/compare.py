"""Trains small NEOs that differ in one thing each, and compares them over seeds.

    python examples/ablations/compare.py --output out                        about 4 hours on two cores
    python examples/ablations/compare.py --output out --steps 40 --seeds 1   to see that it works
    python examples/ablations/compare.py --output out --only mask positions

Needs the extras quickstart, whose data and sizes it uses, and muon. Finished runs in the output are kept, so the same
command continues after an interruption, and further seeds are added to those that exist. Writes `ablations.html`, and
prints its tables as Markdown.
"""

from neo_megatron import command_line
from neo_megatron.paths import Wanted

if __name__ == "__main__":  # before the imports below, which take seconds
    command_line.begin("ablations", {"--output": Wanted.OUTPUT})

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from arms import ABLATIONS, Ablation, Arm
from inputs import INIT_STD, SEQUENCE, write_packs, write_start
from page import page
from results import read_runs, table, verdicts

from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.errors import ConfigError

STEPS, SHAPE_SHARE = 1650, 350 / 1650  # as in the quickstart: a run on shapes, then one on all questions
FIRST_SEED = 1234


@dataclass(frozen=True)
class Job:
    """A run to do."""

    arm: Arm
    seed: int
    output: Path
    steps: int

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.output / "runs" / self.arm.name / str(self.seed)

    def run(self) -> float:
        """Trains and answers; returns the seconds that it took."""
        began = time.monotonic()
        shutil.rmtree(self.directory, ignore_errors=True)  # an interrupted run
        self.directory.mkdir(parents=True)
        on_shapes = round(self.steps * SHAPE_SHARE)
        if self.arm.pre_buffer is None:
            model, weights = ["--neo-model", self._write_model(), "--init-method-std", INIT_STD], []
        else:
            start = write_start(self.output, self.arm.pre_buffer, self.seed)
            model = ["--neo-model", start, "--training-stage", 1]
            weights = ["--pretrained-checkpoint", f"{start}-megatron"]
        self._train("shapes", on_shapes, [*model, *weights])
        weights = ["--pretrained-checkpoint", self.directory / "shapes"]
        answered = ["--valid-data-path", self._packs("test")]
        self._train("questions", self.steps - on_shapes, [*model, *weights, *answered])
        for part in ("shapes", "questions"):  # weights and moments, which nothing reads again
            for checkpoint in (self.directory / part).glob("iter_*"):
                shutil.rmtree(checkpoint)
        return time.monotonic() - began

    def _write_model(self) -> Path:
        sizes = read_sizes(self.output / "data" / "model").replace(**self.arm.sizes)
        model = self.directory / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(sizes.to_hf(), indent=2))
        return model

    def _packs(self, name: str) -> Path:
        return self.output / "packs" / name

    def _train(self, name: str, steps: int, more: list[object]) -> None:
        directory = self.directory / name
        flags = [
            *(*more, *self.arm.flags, "--train-data-path", self._packs(name), "--seq-length", SEQUENCE),
            *("--micro-batch-size", 8, "--global-batch-size", 8, "--num-workers", 0, "--train-iters", steps),
            *("--lr", 5e-4, "--min-lr", 5e-5, "--lr-warmup-fraction", 0.05, "--seed", self.seed),
            *("--log-interval", 5, "--eval-iters", 1, "--eval-interval", steps + 1),
            *("--save", directory, "--save-interval", steps, "--tensorboard-dir", directory / "tensorboard"),
        ]
        partial, log = self.directory / "answers.partial", self.directory / f"{name}.log"
        command = [sys.executable, Path(__file__).with_name("run.py"), partial, self.arm.mask, self.arm.positions]
        with log.open("w") as file:
            done = subprocess.run(
                list(map(str, [*command, *flags])),
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise ConfigError(f"a run ended with exit code {done.returncode}: its output is in {log}")
        if partial.exists():
            partial.rename(self.directory / "answers.json")


def jobs(ablations: list[Ablation], seeds: int, output: Path, steps: int) -> list[Job]:
    """The runs that are not finished yet: all arms with the first seed, then with the next."""
    arms = {arm.name: arm for ablation in ablations for arm in ablation.arms}
    every = [Job(arm, FIRST_SEED + number, output, steps) for number in range(seeds) for arm in arms.values()]
    return [job for job in every if not (job.directory / "answers.json").exists()]


def check_steps(output: Path, steps: int) -> None:
    """Raises ConfigError if the output has runs of another length."""
    record = output / "steps.json"
    if record.exists() and json.loads(record.read_text()) != steps:
        raise ConfigError(f"{output} has runs of {record.read_text()} steps: give another --output, or these --steps")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(steps))


def run_all(waiting: list[Job], processes: int) -> None:
    """Runs jobs, several at once, and says where it stands."""
    # One after the other: several runs of a depth share a language model.
    for job in waiting:
        if job.arm.pre_buffer is not None:
            write_start(job.output, job.arm.pre_buffer, job.seed)
    with ThreadPoolExecutor(processes) as pool:
        for number, (job, seconds) in enumerate(zip(waiting, pool.map(Job.run, waiting), strict=True), start=1):
            print(f"{number} of {len(waiting)}: {job.arm.name}, seed {job.seed}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Runs the ablations."""
    names = [ablation.name for ablation in ABLATIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for data, runs and the page")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of every arm (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="which ablations (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, one thread each (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 10 or arguments.seeds < 1 or arguments.processes < 1:
        raise ConfigError("--steps must be 10 or more, --seeds and --processes 1 or more")
    output = arguments.output.resolve()
    check_steps(output, arguments.steps)
    torch.set_num_threads(1)
    write_packs(output)
    chosen = [ablation for ablation in ABLATIONS if ablation.name in arguments.only]
    run_all(jobs(chosen, arguments.seeds, output, arguments.steps), arguments.processes)
    runs = read_runs(output)
    (output / "ablations.html").write_text(page(runs, arguments.steps), encoding="utf-8")
    for ablation in chosen:
        heading, *rows = table(ablation, runs)
        lines = ["", f"### {ablation.question}", "", *map(_row, (heading, ["---"] * len(heading), *rows))]
        if ablation.published:
            heading = ["order", "difference, points", "this order"]
            lines += ["", *map(_row, (heading, ["---"] * 3, *verdicts(ablation, runs)))]
        print("\n".join(lines))
    print(f"\nthe page to look at: {output / 'ablations.html'}")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    command_line.run("ablations", main)
