"""Steps of NEO at full size, in every layout of examples/train.sh, on GPUs that are not there: see `step_worker.py`.

Nothing raises, the host never waits for the device, and the plan's bytes are those of the step.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.processes import run_python
from support.train_sh import words_of_train_sh

WORKER = Path(__file__).parent / "step_worker.py"
LENGTHS: dict[Any, int] = {1: 16384, 2: 32768, 3: 34816, "neo-9b:2": 18432}
GLOBAL_BATCH = {8: 8, 1024: 1024}
ELEMENTWISE = ["--recompute-granularity", "selective", "--recompute-modules"]
PRECISION = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def layout_of(size: str, stage: int, room: Path) -> list[str]:
    """The flags that examples/train.sh has for a size and stage."""
    words = words_of_train_sh(size, stage, room)
    return words[words.index("--log-throughput") + 1 : words.index("--bf16")]


def transformer_engine() -> str | None:
    """What PYTHONPATH needs for it; None where it is not at hand."""
    directory = os.environ.get("NEO_TEST_TRANSFORMER_ENGINE", "")
    return directory if directory or importlib.util.find_spec("transformer_engine") is not None else None


def step(
    implementation: str, size: str, stage: int, rank: int, ranks: int, flags: list[str], packages: Path | None = None
) -> dict[str, Any]:
    """One step, and its plan; `packages` is a directory of further packages."""
    directory = transformer_engine()
    if implementation == "transformer_engine" and directory is None:
        pytest.skip("Transformer Engine is not at hand; NEO_TEST_TRANSFORMER_ENGINE may name a directory that holds it")
    length = LENGTHS.get(f"{size}:{stage}", LENGTHS[stage])
    chosen: list[Any] = ["--neo-model", size, "--training-stage", stage, "--seq-length", length]
    chosen += ["--micro-batch-size", 1, "--global-batch-size", GLOBAL_BATCH[ranks], "--train-iters", 10, *PRECISION]
    chosen += ["--transformer-impl", implementation, "--no-initialization"]
    path = [str(ROOT)] + [directory] * (implementation == "transformer_engine" and bool(directory))
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, map(str, [*path, packages or ""])))}
    arguments = map(str, (WORKER, rank, ranks, *chosen, *flags))
    done = run_python(*arguments, environment=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], memory: bool = True) -> None:
    # The loss scale is not planned, and a rank has up to a bucket's padding less than the first.
    assert found["state"] == pytest.approx(found["planned_state"], rel=1e-6)
    if memory:
        assert found["peak"] == pytest.approx(found["planned_peak"], rel=0.03)
    sent, planned = found["sent"], found["planned_sent"]
    assert sent.pop("other", 0) < 1e4
    for kind in sent.keys() | planned.keys():
        # Cross entropy and gradient norms send a few numbers for a token, which the plan leaves out.
        assert sent.get(kind, 0) == pytest.approx(planned[kind], rel=1e-3, abs=64), kind


@pytest.mark.slow
def test_a_step_is_as_planned():
    check(step("transformer_engine", "neo-2b", 1, 5, 8, []))


@pytest.mark.slow
def test_a_step_of_the_local_layers_is_as_planned():
    # Memory of the local layers is planned for the kernels of a CPU.
    flags = ["--context-parallel-size", "2", *ELEMENTWISE, "mlp_act"]
    check(step("local", "neo-2b", 2, 3, 8, flags), memory=False)


# Ranks of both pipeline stages, where there are two.
@pytest.mark.thorough
@pytest.mark.parametrize("rank", ["first", "last"])
@pytest.mark.parametrize("ranks", [8, 1024])
@pytest.mark.parametrize(
    ("size", "stage"), [("neo-2b", 1), ("neo-2b", 2), ("neo-2b", 3), ("neo-9b", 1), ("neo-9b", 2), ("u1-8b", 2)]
)
@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
def test_every_layout_is_as_planned(implementation, size, stage, ranks, rank, tmp_path):
    layout = layout_of(size, stage, tmp_path)
    if rank == "last" and "--pipeline-model-parallel-size" not in layout:
        pytest.skip("one stage: all ranks are alike")
    found = step(implementation, size, stage, 0 if rank == "first" else ranks - 1, ranks, layout)
    check(found, memory=implementation == "transformer_engine")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "flags",
    [
        "--recompute-granularity full --recompute-method block --recompute-num-layers 20",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "--recompute-granularity selective --recompute-modules core_attn mlp",
        "--recompute-granularity selective --recompute-modules mlp_act qkv_heads",
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective "
        "--recompute-modules layernorm mlp_act",
        "--tensor-model-parallel-size 2",
        "--context-parallel-size 2 --cp-comm-type allgather",
        "--context-parallel-size 8",
        "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2",
    ],
)
def test_other_layouts_are_as_planned(flags):
    check(step("transformer_engine", "neo-2b", 2, 0, 8, flags.split()))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--context-parallel-size 2 --cp-comm-type a2a",
        "--context-parallel-size 2 --cp-comm-type allgather",
        "--recompute-granularity selective --recompute-modules qkv_heads",
        "--recompute-granularity selective --recompute-modules core_attn",
    ],
)
def test_keys_repeated_for_flash_attention_4_are_as_planned(flags, tmp_path):
    package = tmp_path / "flash_attn" / "cute"  # there is none without a GPU, and its kernel has a stand-in
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    check(step("transformer_engine", "neo-2b", 2, 0, 8, ["--attention-backend", "flash", *flags.split()], tmp_path))
