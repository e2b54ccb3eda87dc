"""The planner as a user meets it; and its schedule of micro-batches in flight against one worked out by hand."""

import json
from dataclasses import replace

import pytest
from support.paths import TOOLS
from support.processes import run_forked, run_python

from neo_megatron.planning.communication import rank_traffic
from neo_megatron.planning.hardware import GPUS, Efficiency, gpu_named
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.memory import peak_in_flight, pipeline_memory
from neo_megatron.planning.report import Plan
from neo_megatron.planning.search import candidates, search
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES

TOOL = TOOLS / "plan.py"
WORKLOAD = Workload.of_alike_documents(16384)
SELECTIVE = dict(recompute_granularity="selective")
H200 = GPUS["h200"]


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
        ("--gpu b200 --attention-backend flash", "capability 9.0 only, and b200 has 10.0: choose auto"),
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
        ("--expert-model-parallel-size 3", "--expert-model-parallel-size 3 does not divide the 128 experts"),
        (
            "--expert-model-parallel-size 4 --expert-tensor-parallel-size 4",
            "4 with 4 tensor-parallel ranks of an expert does not divide the 8 ranks of a pipeline stage",
        ),
        (
            "--expert-tensor-parallel-size 5 --gpus 5 --global-batch-size 5",
            "5 does not divide the 768 channels of an expert",
        ),
        ("--tensor-model-parallel-size 2", "a mixture of experts with --tensor-model-parallel-size needs --sequence-p"),
        (
            "--search --expert-model-parallel-size 128 --pipeline-model-parallel-size 2",
            "the first reason: --expert-model-parallel-size 128 with 1 tensor-parallel ranks of an expert does not",
        ),
        ("--precision fp8 --seq-length 16392", "--fp8-recipe delayed needs a multiple of 16 tokens on a rank"),
    ],
)
def test_impossible_plans_end_in_one_sentence(flags, sentence):
    model = "u1-a3b" if "expert" in sentence else "neo-9b"
    done = run_forked(TOOL, "--neo-model", model, *flags.split())
    assert done.returncode == 1 and done.stdout.startswith("plan: ") and sentence in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_what_is_not_of_the_model_is_refused():
    dense, experts = Layout(**SELECTIVE, recompute_modules=("mlp",)), Layout(**SELECTIVE, recompute_modules=("moe",))
    assert not dense.refusal(SIZES["u1-8b"], 4096) and not experts.refusal(SIZES["u1-a3b"], 4096)
    assert "--recompute-modules mlp is without effect" in dense.refusal(SIZES["u1-a3b"], 4096)
    assert "--recompute-modules moe is without effect" in experts.refusal(SIZES["u1-8b"], 4096)
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        sentence = Layout(data_parallel_size=2, **{name: 2}).refusal(SIZES["u1-8b"], 4096)
        assert sentence == f"--{name.replace('_', '-')} is for a --neo-model with experts: leave it out"
    width = SIZES["u1-a3b"].replace(expert_ffn_hidden_size=24)
    for refused in (dict(precision="fp8"), dict(use_megatron_fsdp=True)):
        sentence = Layout(optimizer="muon", **refused).refusal(SIZES["u1-8b"], 4096)
        assert sentence.endswith("is not for --optimizer muon: leave one of them out")
    assert "and a rank has 24 channels of an expert" in Layout(precision="fp8").refusal(width, 4096)


def test_experts_are_planned():
    flags = (
        "--neo-model u1-a3b --gpus 16 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
    )
    flags += " --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 --training-stage 1"
    done = run_forked(TOOL, *flags.split())
    assert done.returncode == 0, done.stdout
    assert "16 GPUs: TP 2 with SP, PP 1, CP 1, EP 8 x ETP 1, DP 8" in done.stdout
    # 48 layers: attention, its norms and two more, router, experts; words, head, last norm; patches.
    attention = 2048 * 128 * (32 + 2 * 4 + 32) + 2 * 128 + 2 * 2048
    expert = 3 * 2048 * 768
    patches = 768 * 1024 + 1024 + 4 * 1024 * 2048 + 2048
    others = 48 * (attention + 128 * 2048) + 2 * 151936 * 2048 + 2048 + patches
    count, at_work = others + 48 * 128 * expert, others + 48 * 8 * expert
    trained = 48 * (attention - 2 * 2048) + patches
    assert f"{count:,} parameters, of which {at_work:,} work on a token and {trained:,} train in stage 1" in done.stdout


def test_gradients_of_experts_go_to_the_ranks_that_hold_the_same():
    sizes = SIZES["u1-a3b"]
    experts = 48 * 128 * 3 * 2048 * 768

    def gradients(ranks: int, **changes: int) -> float:
        layout = Layout(data_parallel_size=8, global_batch_size=8, **changes)
        sent = rank_traffic(sizes, layout, WORKLOAD, 2, pipeline_rank=0)
        assert sent.parameters == 0 and bool(sent.experts) == bool(changes)
        return sent.gradients - 2 * 4 * experts / layout.expert_model_parallel_size * (ranks - 1) / ranks

    # Without those of experts, the same in all layouts.
    assert gradients(8) == gradients(4, expert_model_parallel_size=2) == gradients(1, expert_model_parallel_size=8)


def test_tokens_of_experts_take_longer_to_other_machines():
    layout = Layout(data_parallel_size=16, expert_model_parallel_size=8, global_batch_size=16)
    eight, four = (replace(H200, network_rate=H200.link_rate / 9, gpus_per_machine=count) for count in (8, 4))
    near, far = (Plan.make(SIZES["u1-a3b"], layout, WORKLOAD, 2, gpu).time for gpu in (eight, four))
    seconds = near.traffic[0].experts / (H200.link_rate * Efficiency().links)
    assert far.seconds - near.seconds == pytest.approx(8 * seconds)


def test_few_tokens_of_an_expert_wait_for_its_weights():
    """Of 512 tokens an expert gets 32 in the mean: its weights take longer through the memory than its products."""
    sizes, workload = SIZES["u1-a3b"], Workload.of_alike_documents(512)
    seconds = {
        size: Plan.make(
            sizes, Layout(data_parallel_size=8, expert_model_parallel_size=size, global_batch_size=8), workload, 2, H200
        ).time.stages[0]
        for size in (1, 8)
    }
    weights = 48 * 128 * 3 * 2048 * 768 * (2 * 2 + 2 * 4)
    assert seconds[1] > weights / (H200.memory_rate * Efficiency().memory) > 3 * seconds[8]


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


def test_keys_that_flash_attention_4_takes_repeated_are_planned():
    """In its backward 16 query heads have a key and a value each, where keys are wider: 67 MB a layer at 8k."""
    workload, selective = Workload.of_alike_documents(8192), dict(**SELECTIVE)

    def more(size: str, **changes) -> float:
        layouts = (Layout(attention_backend=backend, **changes) for backend in ("auto", "flash"))
        auto, flash = (pipeline_memory(SIZES[size], layout, workload, 2)[0] for layout in layouts)
        assert flash.working == auto.working or "recompute_granularity" in changes
        return (flash.activations - auto.activations) / sizes.num_layers / 8192

    sizes, keys, values = SIZES["neo-2b"], 256 * 2, 128 * 2
    assert more("neo-2b") == pytest.approx(8 * keys + 16 * values)
    assert more("u1-8b") == 0  # keys and values are equally wide
    # Recomputed, attention keeps queries and keys as they were; without those, the copies of keys are left.
    assert more("neo-2b", **selective, recompute_modules=("core_attn",)) == pytest.approx(0)
    assert more("neo-2b", **selective, recompute_modules=("qkv_heads",)) == pytest.approx(16 * (keys + values))
    # Exchanged keys stay in memory with the queries; gathered ones are copied for complete packs.
    for way, ranks in (("a2a", 1), ("allgather", 2)):
        found = more("neo-2b", context_parallel_size=2, cp_comm_type=way)
        assert found == pytest.approx(ranks * 16 * (keys + values) / 2)

    def sent(backend: str, **changes) -> float:
        layout = Layout(
            context_parallel_size=2, cp_comm_type="allgather", attention_backend=backend, global_batch_size=2, **changes
        )
        return rank_traffic(sizes, layout, workload, 2, pipeline_rank=0).context

    # Gathered keys are gathered again in the backward, their copies are there; gradients are sent in any case.
    assert 3 * sent("flash") == pytest.approx(2 * sent("auto"))
    recomputed = dict(**selective, recompute_modules=("core_attn",))
    assert sent("flash", **recomputed) == sent("auto", **recomputed)


def test_parameters_in_8_bits_take_the_place_of_those_in_16():
    """--fp8-param-gather: a byte as it is and one transposed, instead of these next to two of bfloat16."""
    given = Layout(precision="fp8", use_distributed_optimizer=True)
    kept = replace(given, fp8_param_gather=True)
    # 40 layers: SwiGLU; query heads and their output; keys, values; queries and keys for h and w.
    matrices = 40 * 2048 * (3 * 6144 + (2 * 16 + 2 * 8 + 16 + 8) * 128)
    both, fp8 = (pipeline_memory(SIZES["neo-2b"], one, WORKLOAD, 2)[0] for one in (given, kept))
    assert both.total - fp8.total == both.fp8_weights == 2 * matrices and fp8.fp8_weights == 0
    assert kept.refusal(SIZES["neo-2b"], 8192) is None
    assert "would round the language model" in kept.refusal(SIZES["neo-2b"], 8192, training_stage=1)
    assert "--fp8-param-gather is for FP8" in replace(kept, precision="bf16").refusal(SIZES["neo-2b"], 8192)
