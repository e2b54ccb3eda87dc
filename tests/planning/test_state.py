"""The planner's bytes of state equal, to the byte, those of real ranks of large layouts, and its chunks Megatron's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from support.processes import run_forked

from neo_megatron.errors import ConfigError
from neo_megatron.planning.layout import Chunk, Layout, layout_stages
from neo_megatron.planning.parameters import Parameter, chunk_parameters
from neo_megatron.planning.state import gradient_buckets, rank_state
from neo_megatron.presets import SIZES

OVERLAPPED = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
# TP8 PP4 CP2 DP16: 1,024 ranks, of which 256 hold a stage and 32 the same parameters.
LARGE = Layout(
    tensor_model_parallel_size=8,
    sequence_parallel=True,
    pipeline_model_parallel_size=4,
    pipeline_model_parallel_layout="Et*9|t*11|t*11|t*11L",
    context_parallel_size=2,
    data_parallel_size=16,
    **OVERLAPPED,
)
INTERLEAVED = Layout(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=4,
    virtual_pipeline_model_parallel_size=2,
    data_parallel_size=5,
    **OVERLAPPED,
)
TWO_STAGES = Layout(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|t*3L", data_parallel_size=3)
# Experts of odd sizes.
MODELS = SIZES | {
    "experts": SIZES["tiny"].replace(
        attention_form="in-head", num_experts=6, experts_per_token=2, expert_ffn_hidden_size=22, hidden_size=132
    )
}
MUON = dict(optimizer="muon")
LOCAL = dict(transformer_impl="local")
DISTRIBUTED = dict(use_distributed_optimizer=True, **LOCAL)
TP2, EP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(expert_model_parallel_size=2)
# TP4 EP8 with experts that are not divided, PP4 DP8: of the 32 ranks of a stage four hold the same experts.
LARGE_EXPERTS = Layout(
    tensor_model_parallel_size=4,
    sequence_parallel=True,
    expert_model_parallel_size=8,
    expert_tensor_parallel_size=1,
    pipeline_model_parallel_size=4,
    data_parallel_size=8,
    **OVERLAPPED,
    **LOCAL,
)
EXPERTS = [
    (Layout(data_parallel_size=3, **DISTRIBUTED), [(0, 0, 0), (2, 0, 2)]),
    (Layout(data_parallel_size=2, **EP2, **LOCAL), [(0, 0, 0)]),
    (Layout(data_parallel_size=6, **EP2, **DISTRIBUTED), [(0, 0, 0), (4, 0, 4), (5, 0, 5)]),
    (Layout(data_parallel_size=2, **TP2, **EP2, **DISTRIBUTED), [(0, 0, 0), (2, 0, 1)]),
    (Layout(data_parallel_size=3, **TP2, expert_tensor_parallel_size=1, **DISTRIBUTED), [(0, 0, 0), (4, 0, 2)]),
    (
        Layout(data_parallel_size=6, pipeline_model_parallel_size=2, **EP2, **OVERLAPPED, **LOCAL),
        [(0, 0, 0), (11, 1, 5)],
    ),
]
# name of the model, stage, layout, and (rank of the world, of the pipeline, among those with the same parameters)
CASES = [
    ("neo-9b", 2, LARGE, [(0, 0, 0), (256, 1, 0), (512, 2, 0), (768, 3, 0), (1023, 3, 31)]),
    ("neo-9b", 1, LARGE, [(0, 0, 0), (255, 0, 31), (768, 3, 0)]),
    # Tied: a copy of the embedding on the first and the last stage, in a bucket of its own.
    ("neo-2b", 3, INTERLEAVED, [(0, 0, 0), (39, 3, 4)]),
    ("neo-2b", 1, Layout(pipeline_model_parallel_size=2), [(0, 0, 0), (1, 1, 0)]),
    ("neo-2b", 2, Layout(precision="fp32"), [(0, 0, 0)]),
    # Small and odd, so that there is padding everywhere.
    ("tiny", 1, TWO_STAGES, [(0, 0, 0), (5, 1, 2)]),
    ("tiny", 2, Layout(precision="fp32", data_parallel_size=7, use_distributed_optimizer=True), [(0, 0, 0), (6, 0, 6)]),
    # Experts: in buffers of their own or, if the same ranks hold the same of all other parameters, with these.
    ("u1-a3b", 2, LARGE_EXPERTS, [(0, 0, 0), (96, 3, 0), (124, 3, 7)]),
    ("u1-a3b", 1, LARGE_EXPERTS, [(0, 0, 0), (127, 3, 7)]),
    *(("experts", stage, layout, ranks) for layout, ranks in EXPERTS for stage in (1, 2)),
    # Matrices in buffers of their own, none of which is cut.
    ("neo-9b", 2, replace(LARGE, **MUON), [(0, 0, 0), (256, 1, 0), (1023, 3, 31)]),
    ("neo-2b", 3, replace(INTERLEAVED, **MUON), [(0, 0, 0), (39, 3, 4)]),
    ("tiny", 1, replace(TWO_STAGES, **MUON), [(0, 0, 0), (5, 1, 2)]),
    ("tiny", 2, Layout(precision="fp32", data_parallel_size=7, **DISTRIBUTED, **MUON), [(0, 0, 0), (6, 0, 6)]),
    ("experts", 1, replace(EXPERTS[5][0], **MUON), [(0, 0, 0), (11, 1, 5)]),
    ("experts", 2, replace(EXPERTS[3][0], **MUON), [(0, 0, 0), (2, 0, 1)]),
]


def flags(model: str, stage: int, layout: Layout, directory: Path) -> list[str]:
    """The layout as a user would write it; the directory has the model that is not a preset."""
    flags = [
        "--neo-model",
        model if model in SIZES else directory,
        "--training-stage",
        stage,
        "--seq-length",
        4096,
        "--train-iters",
        1,
    ]
    flags += ["--optimizer", layout.optimizer]
    flags += ["--micro-batch-size", 1, "--global-batch-size", layout.data_parallel_size * 4]
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        flags += [f"--{name.replace('_', '-')}", getattr(layout, name)]
    if MODELS[model].num_experts:
        flags += ["--expert-model-parallel-size", layout.expert_model_parallel_size]
        flags += ["--expert-tensor-parallel-size", layout.expert_tensor_ranks]
    for name in ("sequence_parallel", *OVERLAPPED):
        flags += [f"--{name.replace('_', '-')}"] * getattr(layout, name)
    if layout.pipeline_model_parallel_layout:
        flags += ["--pipeline-model-parallel-layout", layout.pipeline_model_parallel_layout]
    elif layout.virtual_pipeline_model_parallel_size > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", layout.virtual_pipeline_model_parallel_size]
    return [str(flag) for flag in flags + ["--bf16"] * (layout.precision == "bf16")]


def test_state_equals_a_real_rank_to_the_byte(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["experts"].to_hf()))
    cases = [
        {"argv": flags(*case, tmp_path), "world_size": layout.world_size, "ranks": [rank for rank, *_ in ranks]}
        for *case, ranks in CASES
        for layout in [case[2]]
    ]
    done = run_forked(Path(__file__).parent / "state_worker.py", json.dumps(cases))
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for (model, stage, layout, ranks), rows in zip(CASES, found, strict=True):
        for (rank, pipeline_rank, state_rank), row in zip(ranks, rows, strict=True):
            planned = rank_state(MODELS[model], layout, stage, pipeline_rank, state_rank)
            expected = (planned.parameters, planned.gradients, planned.optimizer)
            assert tuple(row) == expected, f"{model}, stage {stage}, rank {rank}"


@pytest.mark.parametrize("elements", [64, 100])
@pytest.mark.parametrize("limit", [None, 250])
def test_a_run_of_parameters_is_laid_out_as_its_members(elements, limit):
    first, run, last = Parameter(70, True), Parameter(elements, True, count=5), Parameter(9, True)
    found = gradient_buckets([first, run, last], 3, limit)
    single = gradient_buckets([first, *[replace(run, count=1)] * 5, last], 3, limit)
    assert [bucket.size for bucket in found] == [bucket.size for bucket in single]
    for rank in range(3):
        assert [bucket.owned(rank, 3) for bucket in found] == [bucket.owned(rank, 3) for bucket in single]


def test_order_of_experts():
    """Expert by expert, or in Transformer Engine all first matrices before all second ones."""
    sizes, chunk = MODELS["experts"], Chunk(0, 1, embedding=False, head=False)
    first, second = 2 * 22 * 132, 22 * 132
    for implementation, expected in {
        "local": [(first, 1), (second, 1)] * 3,
        "transformer_engine": [(first, 3), (second, 3)],
    }.items():
        layout = Layout(data_parallel_size=2, expert_model_parallel_size=2, transformer_impl=implementation)
        parameters = chunk_parameters(sizes, layout, chunk, training_stage=2)
        assert [(p.elements, p.count) for p in parameters if p.expert] == expected


@pytest.mark.parametrize("layout", ["Et*2|(tt|)*2L", "E|t,t|t*3|L", "Ettt|(t|)*4tL"])
def test_a_layout_reads_as_megatron_reads_it(layout):
    letter = {"embedding": "E", "decoder": "t", "loss": "L"}
    megatron = PipelineParallelLayerLayout.parse_str_to_list(layout)
    assert layout_stages(layout) == ["".join(letter[kind.name] for kind in stage) for stage in megatron]


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-size 4 .* 42 layers: choose"):
        Layout(pipeline_model_parallel_size=4).chunks(SIZES["neo-9b"])
    with pytest.raises(ConfigError, match=r"--pipeline-model-parallel-layout Et\|tL: needs 2 stages"):
        Layout(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tL").chunks(SIZES["neo-9b"])


@pytest.mark.parametrize(
    ("strategy", "stage", "expected"),
    [
        # Two bytes of all parameters, four of all gradients, twelve of this rank's part of both moments and float32.
        ("optim", 2, lambda a, t, n: (2 * a, 4 * t, 12 * n(t))),
        ("optim_grads", 2, lambda a, t, n: (2 * a, 4 * (n(t) + t), 12 * n(t))),
        ("optim_grads_params", 2, lambda a, t, n: (2 * (n(a) + a), 4 * (n(t) + t), 12 * n(t))),
        ("optim_grads_params", 1, lambda a, t, n: (2 * (n(a) + a), 4 * (n(t) + t), 12 * n(t))),
    ],
)
def test_megatron_fsdp_shards_what_its_strategy_says(strategy, stage, expected):
    """Of a model smaller than what is gathered, and waits to be reduced, at once."""
    layout = Layout(data_parallel_size=3, use_megatron_fsdp=True, data_parallel_sharding_strategy=strategy)
    parameters = chunk_parameters(SIZES["tiny"], layout, Chunk(0, SIZES["tiny"].num_layers, True, True), stage)
    complete, trained = (sum(p.total for p in parameters if p.trained or frozen_too) for frozen_too in (True, False))
    state = rank_state(SIZES["tiny"], layout, stage, 0)
    expected = expected(complete, trained, lambda count: -(-count // 3))
    assert (state.parameters, state.gradients, state.optimizer) == expected
    assert (trained < complete) == (stage == 1)


def test_megatron_fsdp_gathers_some_layers_of_a_large_model_at_once():
    layout = Layout(data_parallel_size=64, use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params")
    large = rank_state(SIZES["neo-9b"], layout, 2, 0)
    small = rank_state(SIZES["neo-9b"], replace(layout, suggested_communication_unit_size=10**8), 2, 0)
    assert large.parameters - small.parameters == 2 * (10**9 - 10**8) // 2
    assert large.gradients - small.gradients == 4 * (10**9 - 10**8)
