"""Output of a search: flags for a shell, given flags, no near-duplicates; train.sh has its first choices."""

import re
import shlex
import subprocess

import pytest
from support.paths import ROOT
from support.processes import run_forked
from support.train_sh import words_of_train_sh

from neo_megatron.planning.hardware import GPUS
from neo_megatron.planning.report import Plan
from neo_megatron.planning.search import candidates, distinct, flags, search
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES

TINY = SIZES["tiny"]


def looked_at(**given) -> list:
    """Layouts of the tiny model on eight GPUs that a search with these flags looks at."""
    return list(candidates(TINY, 8, Workload.of_alike_documents(1024), 2, 16, "bf16", 8, given=given))


@pytest.fixture(scope="module")
def printed() -> str:
    """A search for the tiny model in FP8 with its pre-buffer on a pipeline stage of its own."""
    command = "--neo-model tiny --gpus 4 --seq-length 1024 --global-batch-size 8 --precision fp8 --search --top 4"
    command += " --pre-buffer-pipeline-stages 1 --pipeline-model-parallel-size 2 --micro-batch-size 2"
    done = run_forked(ROOT / "tools" / "plan.py", *command.split())
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_flags_of_the_first_choice_can_be_pasted_into_a_shell(printed):
    line = next(line for line in printed.splitlines() if line.startswith("--"))
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    words = pasted.stdout.splitlines()
    assert words == shlex.split(line) and words[words.index("--pipeline-model-parallel-layout") + 1] == "Ett|ttL"
    for flag, value in {"--micro-batch-size": "2", "--global-batch-size": "8", "--fp8-format": "hybrid"}.items():
        assert words[words.index(flag) + 1] == value
    assert "--bf16" in words


def test_the_table_has_given_flags_and_no_near_duplicates(printed):
    rows = [re.split(" {2,}", line) for line in printed.splitlines() if line.startswith("TP ")]
    assert rows and all("PP 2," in layout and micro_batch == "2" for layout, micro_batch, *_ in rows)
    assert len({layout.replace(" with SP", "") for layout, *_ in rows}) == len(rows)


@pytest.mark.parametrize(
    "given",
    [
        dict(tensor_model_parallel_size=2),
        dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, cp_comm_type="allgather"),
        dict(pipeline_model_parallel_size=2, micro_batch_size=4),
        dict(pipeline_model_parallel_layout="Et|t|t|tL"),
        dict(recompute_granularity="selective", recompute_modules=("mlp",)),
        dict(transformer_impl="local"),
    ],
    ids=lambda given: " ".join(given),
)
def test_given_flags_are_honoured(given):
    layouts = looked_at(**given)
    assert layouts
    for layout in layouts:
        for name, value in given.items():
            assert getattr(layout, name) == value
    # And nothing else is left out: these are the layouts of a free search that have them.
    names = [name for name in given if name != "cp_comm_type"]
    if "pipeline_model_parallel_layout" not in given and "transformer_impl" not in given:
        free = [layout for layout in looked_at() if all(getattr(layout, name) == given[name] for name in names)]
        assert {flags_of_sizes(layout) for layout in free} == {flags_of_sizes(layout) for layout in layouts}


def flags_of_sizes(layout) -> tuple:
    """A layout but for how context parallelism exchanges."""
    return tuple(word for word in flags(layout) if word not in ("--cp-comm-type", "allgather"))


def test_experts_are_dealt_to_all_numbers_of_ranks_that_divide_them():
    sizes = TINY.replace(num_experts=12, experts_per_token=2, expert_ffn_hidden_size=64)
    layouts = list(candidates(sizes, 8, Workload.of_alike_documents(1024), 2, 16, "bf16", 8))
    found = {
        (layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tensor_ranks)
        for layout in layouts
        if layout.pipeline_model_parallel_size == 1
    }
    assert found == {(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 1, 2), (2, 2, 2), (2, 4, 2), (2, 1, 1), (2, 2, 1), (2, 4, 1)}
    assert all(layout.sequence_parallel for layout in layouts if layout.tensor_model_parallel_size > 1)
    assert {word for layout in layouts for word in layout.recompute_modules} == {
        "core_attn",
        "layernorm",
        "moe",
        "qkv_heads",
    }
    given = dict(expert_model_parallel_size=4, expert_tensor_parallel_size=1, tensor_model_parallel_size=2)
    layouts = list(candidates(sizes, 8, Workload.of_alike_documents(1024), 2, 16, "bf16", 8, given=given))
    for layout in layouts:
        words = flags(layout)
        for flag, value in (("--expert-model-parallel-size", "4"), ("--expert-tensor-parallel-size", "1")):
            assert words[words.index(flag) + 1] == value
    assert layouts and not any("--expert-model-parallel-size" in flags(layout) for layout in looked_at())
    # They are not near-duplicates of each other.
    plans, _ = search(sizes, 8, Workload.of_alike_documents(1024), 2, GPUS["h100"], 16)
    listed = {(plan.layout.expert_model_parallel_size, plan.layout.expert_tensor_ranks) for plan in distinct(plans)}
    assert {(count, 1) for count in (1, 2, 4)} | {(count, 2) for count in (1, 2, 4)} <= listed


def test_virtual_stages_that_are_given():
    layouts = looked_at(num_virtual_stages_per_pipeline_rank=2)
    assert layouts and {layout.virtual_pipeline_model_parallel_size for layout in layouts} == {2}


def test_near_duplicates_are_left_out():
    workload = Workload.of_alike_documents(4096)
    seen = []
    plans, count = search(SIZES["neo-2b"], 4, workload, 2, GPUS["h100"], 8, progress=lambda *now: seen.append(now))
    kept = distinct(plans)
    assert kept[0] is plans[0] and len(kept) < len(plans) / 3
    assert len(seen) == count // 50 and seen == sorted(seen) and seen[-1][0] <= count

    def sizes(plan: Plan) -> tuple[int, ...]:
        layout = plan.layout
        return (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.micro_batch_size,
        )

    for number, plan in enumerate(kept):
        assert all(plan.needed <= 0.9 * other.needed for other in kept[:number] if sizes(other) == sizes(plan))
    # What is left out has a faster one of the same sizes that needs at most a tenth more.
    for plan in plans:
        assert any(sizes(other) == sizes(plan) and 0.9 * other.needed < plan.needed for other in kept) or plan in kept


@pytest.mark.parametrize(
    ("size", "stage", "length"),
    [("neo-2b", 2, 32768), ("neo-9b", 2, 18432), ("u1-a3b", 2, 32768)]
    + [
        pytest.param(*preset, marks=pytest.mark.thorough)
        for preset in [
            *(("neo-2b", 1, 16384), ("neo-2b", 3, 34816), ("neo-9b", 1, 16384)),
            *(("neo-ov-2b", 1, 16384), ("neo-ov-2b", 2, 36864), ("neo-ov-9b", 1, 16384), ("neo-ov-9b", 2, 36864)),
            *(("u1-8b", 1, 16384), ("u1-8b", 2, 32768), ("u1-a3b", 1, 16384)),
        ]
    ],
)
def test_presets_of_train_sh_are_first_choices(size, stage, length, tmp_path):
    started = words_of_train_sh(size, stage, tmp_path)
    workload = Workload.of_alike_documents(length)
    plans, _ = search(SIZES[size], 8, workload, stage, GPUS["h100"], global_batch_size=128)
    first = flags(plans[0].layout)
    for word in first:
        assert word in started, (word, first)
    parallel = {word for word in started if "parallel" in word or "recompute" in word}
    assert parallel <= set(first)
    values = {
        word: started[started.index(word) + 1]
        for word in parallel
        if not started[started.index(word) + 1].startswith("--")
    }
    assert values == {word: first[first.index(word) + 1] for word in values}


def test_a_given_recomputation_takes_the_place_of_that_of_train_sh(tmp_path):
    given = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    words = words_of_train_sh("neo-9b", 2, tmp_path, *given)
    assert [word for word in words if word.startswith("--recompute")] == given[::2]
    words = words_of_train_sh("u1-a3b", 2, tmp_path, "--recompute-granularity", "selective")
    assert [word for word in words if word.startswith("--recompute")] == ["--recompute-granularity"]
