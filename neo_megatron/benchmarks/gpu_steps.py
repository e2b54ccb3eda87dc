"""The training steps that the GPU benchmark measures: which, in which order, with how much recomputation."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neo_megatron.benchmarks import gpu_plain, gpu_train
from neo_megatron.benchmarks.gpu_jobs import Job, run_jobs
from neo_megatron.benchmarks.gpu_window import Windows
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.hardware import GPUS
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.report import Plan
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES
from neo_megatron.validation.fp8 import fp8_format

_BF16 = ("--transformer-impl", "transformer_engine", "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce")
_BF16 += ("--overlap-param-gather",)


def _fp8(recipe: str) -> tuple[str, ...]:
    return (*_BF16, "--fp8-format", fp8_format(recipe), "--fp8-recipe", recipe)


# Flags of pretrain_neo: precision as a user asks for it, the distributed optimizer as examples/train.sh has it.
PRECISIONS = {
    "float32": (),
    "bf16": _BF16,
    "delayed": _fp8("delayed"),
    "tensorwise": _fp8("tensorwise"),
    "blockwise": _fp8("blockwise"),
    # Delayed scaling has no such layers: it scales all together.
    "tensorwise-bf16-ends": (*_fp8("tensorwise"), "--first-last-layers-bf16"),
    "blockwise-bf16-ends": (*_fp8("blockwise"), "--first-last-layers-bf16"),
}
FP8 = tuple(name for name, flags in PRECISIONS.items() if "--fp8-recipe" in flags)
OURS, PLAIN = "neo_megatron", "transformers"
# Shares of layers to recompute: the first with which the plan fits, and the next one if memory runs out.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Scale:
    """The size of the measurement on a machine.

    Args:
        steps: of each measured window.
        shrunk: divides the samples of the mix, see `draw_packs`.
        precisions: of `PRECISIONS`; the first is the plain loop's as well.
        at_last: further precisions, only in stage 2 and at the first length, and only if time is left.
    """

    sizes: NeoSizes
    lengths: tuple[int, ...]
    steps: int
    shrunk: int
    precisions: tuple[str, ...]
    at_last: tuple[str, ...] = ()


ON_GPU = Scale(
    sizes=SIZES["neo-2b"],
    lengths=(8192, 16384),
    steps=8,
    shrunk=1,
    precisions=("bf16", "delayed", "tensorwise", "blockwise"),
    at_last=("tensorwise-bf16-ends", "blockwise-bf16-ends"),
)
ON_CPU = Scale(
    # Ids of the control tokens that a vocabulary of 512 has.
    sizes=SIZES["tiny"].replace(image_start_token_id=510, image_context_token_id=511),
    lengths=(256,),
    steps=2,
    shrunk=4,
    precisions=("float32",),
)


@dataclass(frozen=True)
class StepRun:
    """One row: side, precision, training stage, pack length and recomputed layers."""

    who: str
    precision: str
    training_stage: int
    length: int
    recomputed: int = 0


def measure_steps(
    scale: Scale, memory: float | None, scratch: Path, last_start: float
) -> Iterator[tuple[StepRun, dict[str, Any]]]:
    """Every run with its figures, or with ``failed``, the reason why it has none.

    Args:
        memory: bytes of the GPU; ``None`` without one.
        last_start: on the monotonic clock; what has not begun by then is not run.
    """
    queue = deque(grouped([replace(run, recomputed=planned(run, scale.sizes, memory)) for run in runs(scale)]))
    groups: dict[str, list[StepRun]] = {}

    def jobs() -> Iterator[Job]:
        while queue and time.monotonic() < last_start:
            group = queue.popleft()
            job = job_of(group, scale, scratch)
            groups[job.name] = group
            yield job

    with tqdm(total=len(runs(scale)), unit="run", file=sys.stderr) as progress:
        while queue and time.monotonic() < last_start:
            for job, reports in run_jobs(jobs(), scratch):
                progress.set_postfix_str(job.name)
                group, figures = groups[job.name], [report for report in reports if "failed" not in report]
                for run, report in zip(group, figures, strict=False):
                    yield run, report
                    progress.update()
                missing = group[len(figures) :]
                more = [with_more_recomputed(run, scale.sizes) for run in missing]
                if missing and "out of memory" in reports[-1]["failed"].lower() and None not in more:
                    queue.appendleft(more)
                    continue
                for run in missing:
                    yield run, reports[-1]
                    progress.update()
    for run in sum(queue, []):
        yield run, {"failed": "not run: the time was up"}


def runs(scale: Scale) -> list[StepRun]:
    """The rows, most important first."""
    first = scale.precisions[0]
    order = [(OURS, first, 2), (PLAIN, first, 2), (OURS, first, 1)]
    order += [(OURS, precision, stage) for precision in scale.precisions[1:] for stage in (2, 1)]
    rows = [StepRun(*row, length) for row in order for length in scale.lengths]
    return rows + [StepRun(OURS, precision, 2, scale.lengths[0]) for precision in scale.at_last]


def grouped(rows: Sequence[StepRun]) -> list[list[StepRun]]:
    """Rows that one process can measure: they differ in the length of packs alone."""
    groups: dict[StepRun, list[StepRun]] = {}
    for row in rows:
        groups.setdefault(replace(row, length=0), []).append(row)
    return list(groups.values())


def planned(run: StepRun, sizes: NeoSizes, memory: float | None) -> int:
    """Layers to recompute by the planner's estimate; the plain loop starts with none."""
    if memory is None or run.who == PLAIN:
        return 0
    workload = Workload.of_alike_documents(run.length)
    for share in SHARES:
        layers = round(share * sizes.num_layers)
        layout = Layout(
            use_distributed_optimizer=True,
            recompute_granularity="full" if layers else None,
            recompute_method="block" if layers else None,
            recompute_num_layers=layers or 1,
            precision="fp8" if run.precision in FP8 else "bf16",
            fp8_param_gather=keeps_fp8(run),
        )
        if Plan.make(sizes, layout, workload, run.training_stage, GPUS["h100"].with_memory(memory)).fits:
            break
    return layers


def with_more_recomputed(run: StepRun, sizes: NeoSizes) -> StepRun | None:
    """The next attempt at a run that has run out of memory; ``None`` if all layers were recomputed already."""
    shares = SHARES if run.who == OURS else (0.0, 1.0)
    more = [layers for share in shares if (layers := round(share * sizes.num_layers)) > run.recomputed]
    return replace(run, recomputed=more[0]) if more else None


def job_of(group: Sequence[StepRun], scale: Scale, scratch: Path) -> Job:
    """The process that measures a group of runs, which differ only in the length of packs."""
    run = group[0]
    lengths = tuple(row.length for row in group)
    windows = Windows(scale.sizes, run.training_stage, lengths, scale.steps, scale.shrunk)
    name = f"{run.who}-{run.precision}-stage{run.training_stage}-{'-'.join(map(str, lengths))}"
    name += f"-recomputed{run.recomputed}" if run.recomputed else ""
    if run.who == PLAIN:
        settings = {"windows": windows, "checkpointing": run.recomputed > 0}
        return Job(name, gpu_plain.prepare, gpu_plain.run, settings)
    windows = replace(windows, profiled=(run.precision, run.training_stage) == ("bf16", 2))
    settings = {"windows": windows, "model": scratch, "flags": flags(run)}
    return Job(name, gpu_train.prepare, gpu_train.run, settings)


def keeps_fp8(run: StepRun) -> bool:
    """Whether parameters are held in FP8.

    In stage 1 frozen weights would be rounded for good, and delayed scaling rounds those of a checkpoint badly.
    """
    return run.precision in FP8 and run.precision != "delayed" and run.training_stage > 1


def flags(run: StepRun) -> list[str]:
    """Of pretrain_neo, in addition to those that all runs have."""
    chosen: list[Any] = [*PRECISIONS[run.precision]]
    if keeps_fp8(run):
        chosen += ["--fp8-param-gather"]
    if run.recomputed:
        chosen += ["--recompute-granularity", "full", "--recompute-method", "block"]
        chosen += ["--recompute-num-layers", run.recomputed]
    return [str(part) for part in chosen]


def as_record(run: StepRun, report: dict[str, Any]) -> dict[str, Any]:
    """A run and its report as one flat row of JSON."""
    return asdict(run) | report
