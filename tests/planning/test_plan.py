"""The planner as a user meets it; and its schedule of micro-batches in flight against one worked out by hand."""

import json

import pytest
from support.paths import TOOLS
from support.processes import run_forked, run_python

from neo_megatron.planning.hardware import GPUS, gpu_named
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.memory import peak_in_flight
from neo_megatron.planning.report import Plan
from neo_megatron.planning.search import candidates, search
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES

TOOL = TOOLS / "plan.py"
WORKLOAD = Workload.of_alike_documents(16384)


def test_the_tool_prints_a_plan_without_torch():
    flags = (
        "--neo-model neo-9b --gpus 64 --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer"
    )
    program = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_python("-c", f"{program}; assert 'torch' not in sys.modules", TOOL, *flags.split())
    assert done.returncode == 0, done.stdout
    assert "64 GPUs: TP 4 with SP, PP 1, CP 1, DP 16" in done.stdout and "fits: rank 0 needs" in done.stdout
    done = run_forked(TOOL, *flags.split(), "--json")
    plan = json.loads(done.stdout)
    memory = plan["memory"][0]
    parts = [*memory["state"].values(), memory["fp8_weights"], memory["activations"], memory["working"]]
    assert memory["total"] == sum(parts) and plan["fits"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--tensor-model-parallel-size 16 --gpus 16",
            "--tensor-model-parallel-size 16 does not divide the 8 key-value",
        ),
        ("--context-parallel-size 3 --gpus 24 --global-batch-size 24", "--seq-length 16384 cannot be divided over"),
        ("--tensor-model-parallel-size 8 --gpus 4", "is 8 GPUs, and 4 is not a multiple"),
        ("--gpu a100 --precision fp8", "--gpu a100 has no fp8"),
        ("--gpu-memory 1 --search --gpus 1 --global-batch-size 4", "none of the"),
        ("--seq-length -5", "argument --seq-length: -5 is not a whole number of 1 or more"),
        ("--micro-batch-size 0", "argument --micro-batch-size: 0 is not a whole number of 1 or more"),
        ("--gpus 1e9", "argument --gpus: 1e9 is not a whole number of 1 or more"),
        ("--image-share 1.5", "argument --image-share: 1.5 is not a share from 0 to 1"),
        ("--gpu-memory nan", "argument --gpu-memory: nan is not a number of gigabytes from 0 on"),
        ("--training-stage 4", "argument --training-stage: invalid choice: 4"),
        ("--gpus 100000", "--global-batch-size 256 is not a multiple of"),
        (
            "--gpus 100000 --search",
            "--global-batch-size 256 cannot be divided over the data-parallel ranks of any layout",
        ),
        (
            "--search --tensor-model-parallel-size 16",
            "--tensor-model-parallel-size 16 is 16 GPUs, and --gpus 8 is not a",
        ),
        (
            "--search --pipeline-model-parallel-layout Ett|tL",
            "needs 2 stages with the embeddings E, 42 layers t and the",
        ),
        ("--recompute-modules mlp", "--recompute-modules is for --recompute-granularity selective"),
        ("--recompute-granularity full", "needs to know which layers: add --recompute-method"),
        ("--precision fp8 --seq-length 16392", "--fp8-recipe delayed needs a multiple of 16 tokens on a rank"),
    ],
)
def test_impossible_plans_end_in_one_sentence(flags, sentence):
    done = run_forked(TOOL, "--neo-model", "neo-9b", *flags.split())
    assert done.returncode == 1 and done.stdout.startswith("plan: ") and sentence in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_micro_batches_in_flight():
    """1F1B: rank r of P runs P - r forwards before its first backward. Interleaved: by hand, after Megatron's table."""
    four = Layout(pipeline_model_parallel_size=4, global_batch_size=16)
    assert [peak_in_flight([1.0], rank, four) for rank in range(4)] == [4, 3, 2, 1]
    few = Layout(pipeline_model_parallel_size=4, global_batch_size=2)
    assert [peak_in_flight([1.0], rank, few) for rank in range(4)] == [2, 2, 2, 1]
    # Two ranks of two chunks. Rank 0 runs forwards of 0, 0, 1, 1 ahead, then forwards of 0, 0 in turn with backwards of
    # 1, 1: before the second of these it keeps 0 four times. Rank 1 runs 0, 0 ahead, 1, 1 in turn with 1, 1, then 0.
    two = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, global_batch_size=8)
    assert peak_in_flight([10.0, 1.0], 0, two) == 4 * 10 + 1
    assert peak_in_flight([10.0, 1.0], 1, two) == 3 * 10


def test_a_search_ranks_what_fits():
    sizes, gpu = SIZES["neo-2b"], GPUS["h100"]
    plans, count = search(sizes, 4, WORKLOAD, 2, gpu, global_batch_size=8)
    assert 0 < len(plans) < count
    assert all(plan.needed <= gpu.memory and plan.layout.world_size == 4 for plan in plans)
    speeds = [plan.time.tokens_per_second for plan in plans]
    assert speeds == sorted(speeds, reverse=True) and 0 < plans[0].time.mfu < 1
    # Nothing that fits was passed over.
    small = list(candidates(sizes, 4, WORKLOAD, 2, 8, "bf16", gpu.gpus_per_machine))[::20]
    fitting = {layout for layout in small if Plan.make(sizes, layout, WORKLOAD, 2, gpu).fits}
    assert fitting and fitting <= {plan.layout for plan in plans}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),  # slower, and not stated
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H20", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_rates_of_a_device_are_stated_or_unknown(device, name):
    gpu = gpu_named(device)
    assert (gpu and gpu.name) == name
