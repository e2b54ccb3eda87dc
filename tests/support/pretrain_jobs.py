"""Runs of `pretrain_neo` for tests: many in one launch, each with flags of its own, and what they logged."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from support.paths import TESTS
from support.processes import run_ranks, torchrun

WORKER = TESTS / "distributed" / "pretrain_worker.py"

# Where one rank waits for another that has failed otherwise, the test fails soon.
PATIENCE = ("--distributed-timeout-minutes", "2")


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        directory: where it logs; made by the run.
        flags: the command line of `pretrain_neo`; a TensorBoard directory is added.
        gradients: whether to keep the gradients of the last step.
        spoilt: numbers of packs, the weight that their tokens get, and how often they do, from the first reading on.
        tensorboard: whether to add one.
    """

    directory: Path
    flags: Sequence[str]
    gradients: bool = False
    spoilt: tuple[Sequence[int], float, int] | None = None
    tensorboard: bool = True

    def printed(self, rank: int = 0) -> str:
        return (self.directory / f"rank{rank}.log").read_text()

    def inputs(self, rank: int) -> list[dict[str, int]]:
        """First dimension of every tensor that each call of the model was given, keyed by argument."""
        return json.loads((self.directory / f"rank{rank}.inputs.json").read_text())

    def stored(self, rank: int) -> dict[str, Any]:
        """Tensors that a rank has ``read`` and held to be ``written``, and how often it has ``listed`` a checkpoint."""
        return json.loads((self.directory / f"rank{rank}.stored.json").read_text())

    def exit(self) -> str | int | None:
        """The argument of `sys.exit`: a sentence for a mistake; `None` where it ended by itself."""
        return json.loads((self.directory / "result.json").read_text())["exit"]

    def passes(self) -> dict[str, int]:
        """Passes over gradients: ``checks`` of the norm of a bucket, and ``scalings`` of a buffer."""
        result = json.loads((self.directory / "result.json").read_text())
        return {kind: result[kind] for kind in ("checks", "scalings")}

    def scalars(self, tag: str) -> dict[int, list[float]]:
        """The values logged at each step."""
        return self.every_scalar()[tag]

    def every_scalar(self) -> dict[str, dict[int, list[float]]]:
        """By tag, the values logged at each step."""
        events = EventAccumulator(str(self.directory / "events"))
        events.Reload()
        values: dict[str, dict[int, list[float]]] = {}
        for tag in events.Tags()["scalars"]:
            of_step = values[tag] = defaultdict(list)
            for event in events.Scalars(tag):
                of_step[event.step].append(event.value)
        return {tag: dict(of_step) for tag, of_step in values.items()}

    def read_gradients(self) -> dict[str, Tensor]:
        """Complete tensors under the names of a distributed checkpoint, put together from the parts of all ranks."""
        complete: dict[str, Tensor] = {}
        for file in sorted(self.directory.glob("rank*.gradients.safetensors")):
            with safe_open(file, "pt") as parts:
                for part, place in parts.metadata().items():
                    name, shape, offset = json.loads(place)
                    tensor = parts.get_tensor(part)
                    here = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
                    # What no rank has stays not a number.
                    complete.setdefault(name, torch.full(shape, torch.nan))[here] = tensor
        return complete


def run_jobs(processes: int, jobs: Sequence[Job], environment: dict[str, str] | None = None) -> str:
    """Runs the jobs one after another in one set of processes.

    Raises:
        AssertionError: one of them failed with anything but a call of `sys.exit`.
    """
    written = [
        {
            "argv": [
                *map(str, job.flags),
                *(("--tensorboard-dir", f"{job.directory}/events") if job.tensorboard else ()),
                *PATIENCE,
            ],
            "directory": str(job.directory),
            "gradients": job.gradients,
            "spoilt": job.spoilt,
        }
        for job in jobs
    ]
    file = jobs[0].directory.with_suffix(f".jobs{processes}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(written))
    # Stand-ins for packages must be there when Megatron is imported.
    start = torchrun if "PYTHONPATH" in (environment or {}) else run_ranks
    return start(processes, WORKER, file, environment=environment)
