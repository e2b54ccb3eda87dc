"""Stage 1 compared to training everything: what frozen parameters save in time and memory, on the pack of `train`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

from neo_megatron.benchmarks import train_ours
from neo_megatron.benchmarks.table import Row
from neo_megatron.benchmarks.train import STEPS, WARM_UP, answer, worker
from neo_megatron.benchmarks.train_inputs import LENGTH, write_inputs
from neo_megatron.benchmarks.train_step import Step
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.planning.flops import model_flops
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.state import rank_state
from neo_megatron.planning.workload import Workload

VOCABULARIES = (1024, 32768)


def measure(scratch: Path) -> list[Row]:
    """Time and memory of a step of stage 1, next to a step that trains everything."""
    rows = []
    for vocabulary in VOCABULARIES:
        inputs = write_inputs(scratch / "train", vocabulary)
        rows += _rows(f"stage 1, vocabulary {vocabulary:,}", inputs, vocabulary, *take_turns(inputs, vocabulary))
    return rows


def take_turns(inputs: Path, vocabulary: int) -> tuple[list[Step], list[Step]]:
    """Steps of stage 1 and of stage 2, each in a process of its own, which take turns."""
    with ExitStack() as stack:
        sides = [stack.enter_context(worker(train_ours.run, inputs, vocabulary, False, stage)) for stage in (1, 2)]
        steps: list[list[Step]] = [[], []]
        for _ in range(WARM_UP + STEPS):
            for side, done in zip(sides, steps, strict=True):
                side.send(True)
                done.append(answer(side, inputs))
    return steps[0][WARM_UP:], steps[1][WARM_UP:]


def _rows(what: str, inputs: Path, vocabulary: int, first: Sequence[Step], every: Sequence[Step]) -> list[Row]:
    def both(name: str, unit: str, of: Callable[[Sequence[Step]], float]) -> Row:
        return Row(f"{what}: {name}", unit, of(first), of(every), "training all")

    def part(name: str) -> Callable[[Sequence[Step]], float]:
        return lambda steps: 1000 * median(step.parts[name] for step in steps)

    counted = [_operations(inputs, vocabulary, stage) for stage in (1, 2)]
    sizes = read_sizes(inputs / f"hf-{vocabulary}")
    states = [rank_state(sizes, Layout(precision="fp32"), stage, pipeline_rank=0) for stage in (1, 2)]
    state = [(held.gradients + held.optimizer) / 1e6 for held in states]
    return [
        both("step", "ms", lambda steps: 1000 * median(step.seconds for step in steps)),
        both("backward", "ms", part("backward")),
        both("clipping and AdamW", "ms", part("optimizer")),
        both("peak memory", "MB", lambda steps: max(step.memory for step in steps) / 1e6),
        Row(f"{what}: gradients and moments, planned", "MB", state[0], state[1], "training all"),
        Row(f"{what}: matrix products of a step, planned", "GFLOP", counted[0], counted[1], "training all"),
    ]


def _operations(inputs: Path, vocabulary: int, stage: int) -> float:
    """GFLOP of this pack."""
    pack = load_file(inputs / "plain.safetensors")
    workload = Workload(
        LENGTH,
        mean_keys=pack["attention_mask"].sum().item() / LENGTH,
        image_share=len(pack["pixel_values"]) / 4 / LENGTH,
        trained_share=(pack["labels"] >= 0).sum().item() / LENGTH,
    )
    sizes = read_sizes(inputs / f"hf-{vocabulary}")
    return model_flops(sizes, stage, workload).total(sizes).training * LENGTH / 1e9
