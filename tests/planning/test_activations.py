"""Planned bytes of activations and of traffic against those that a real model keeps and sends on a CPU."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.processes import run_forked

from neo_megatron.planning.activations import chunk_bytes
from neo_megatron.planning.communication import rank_traffic
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES

LENGTH, IMAGE_TOKENS, TRAINED = 256, 128, 64
WORKLOAD = Workload(LENGTH, mean_keys=LENGTH, image_share=IMAGE_TOKENS / LENGTH, trained_share=TRAINED / LENGTH)
SEPARATE = SIZES["tiny"].replace(
    num_attention_heads=4, head_dim=32, ffn_hidden_size=384, vocab_size=1024, pre_buffer_layers=2, post_llm_layers=3
)
SELECTIVE = dict(recompute_granularity="selective")
FULL = dict(recompute_granularity="full", recompute_num_layers=2)
SHARED = dict(tensor_model_parallel_size=2, sequence_parallel=True)
STAGE_2: dict[str, dict] = {
    "all kept": dict(),
    "core_attn": dict(**SELECTIVE, recompute_modules=("core_attn",)),
    "mlp": dict(**SELECTIVE, recompute_modules=("mlp",)),
    "mlp_act and qkv_heads": dict(**SELECTIVE, recompute_modules=("mlp_act", "qkv_heads")),
    "qkv_heads": dict(**SELECTIVE, recompute_modules=("qkv_heads",)),
    "layernorm and core_attn": dict(**SELECTIVE, recompute_modules=("layernorm", "core_attn")),
    "full, uniform": dict(**FULL, recompute_method="uniform"),
    "TP2": dict(tensor_model_parallel_size=2),
    "TP2 with SP": SHARED,
    "TP2 with SP, layernorm": dict(**SHARED, **SELECTIVE, recompute_modules=("layernorm",)),
    "TP2 with SP, full, block": dict(**SHARED, **FULL, recompute_method="block"),
    "CP2, heads exchanged": dict(context_parallel_size=2, cp_comm_type="a2a"),
    "CP2, keys gathered": dict(context_parallel_size=2, cp_comm_type="allgather"),
    "bf16": dict(precision="bf16"),
}
IN_HEAD = SEPARATE.replace(attention_form="in-head")
EXPERTS = IN_HEAD.replace(num_experts=8, experts_per_token=2, expert_ffn_hidden_size=96)
EP2 = dict(expert_model_parallel_size=2)
STAGE_2_OF_EXPERTS: dict[str, dict] = {
    "all kept": dict(),
    "moe": dict(**SELECTIVE, recompute_modules=("moe",)),
    "qkv_heads": STAGE_2["qkv_heads"],
    "layernorm and core_attn": STAGE_2["layernorm and core_attn"],
    "full, uniform": STAGE_2["full, uniform"],
    "bf16": dict(precision="bf16"),
    "TP2 with SP": SHARED,
    "TP2 with SP, undivided experts": dict(**SHARED, expert_tensor_parallel_size=1),
    "CP2, keys gathered": STAGE_2["CP2, keys gathered"],
    "EP2": EP2,
    "EP4, bf16, moe": dict(
        expert_model_parallel_size=4, precision="bf16", **SELECTIVE, recompute_modules=("layernorm", "moe")
    ),
    "EP2, TP2 with SP": dict(**EP2, **SHARED),
    "EP2, TP2 with SP, bf16, full, block": dict(**EP2, **SHARED, **FULL, recompute_method="block", precision="bf16"),
    "EP2, TP2 with SP, undivided experts": dict(**EP2, **SHARED, expert_tensor_parallel_size=1),
}
STAGE_1 = (
    "all kept",
    "core_attn",
    "mlp_act and qkv_heads",
    "TP2 with SP",
    "TP2 with SP, full, block",
    "CP2, keys gathered",
    "bf16",
)
STAGE_1_OF_EXPERTS = ("all kept", "moe", "bf16", "TP2 with SP", "EP2, TP2 with SP", "EP4, bf16, moe")
CASES = {
    f"{model}, stage {stage}, {name}": (sizes, stage, layouts[name])
    for model, sizes, layouts, of_stage_1 in (
        ("separate", SEPARATE, STAGE_2, STAGE_1),
        ("in-head", IN_HEAD, STAGE_2, STAGE_1),
        ("experts", EXPERTS, STAGE_2_OF_EXPERTS, STAGE_1_OF_EXPERTS),
    )
    for stage, names in ((2, layouts), (1, of_stage_1))
    for name in names
}


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, float]]:
    cases = []
    for sizes, stage, settings in CASES.values():
        settings = dict(settings)
        settings["bf16"] = settings.pop("precision", "fp32") == "bf16"
        ranks = {
            "tensor": settings.pop("tensor_model_parallel_size", 1),
            "context": settings.pop("context_parallel_size", 1),
            "experts": settings.pop("expert_model_parallel_size", 1),
            "expert_tensor": settings.pop("expert_tensor_parallel_size", None),
        }
        case = {"sizes": asdict(sizes), "stage": stage, "batch": (LENGTH, IMAGE_TOKENS, TRAINED), "settings": settings}
        cases.append(case | ranks)
    done = run_forked(Path(__file__).parent / "activation_worker.py", json.dumps(cases))
    assert done.returncode == 0, done.stdout[-6000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_activations_are_within_a_tenth_of_what_is_kept(case, measured):
    sizes, stage, _ = CASES[case]
    layout = layout_of(case)
    [[chunk]] = layout.chunks(sizes)
    assert chunk_bytes(sizes, layout, WORKLOAD, chunk, stage) == pytest.approx(measured[case][0], rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_traffic_is_what_is_sent(case, measured):
    """But for a few numbers a token: of the cross entropy, and of positions under context parallelism."""
    sizes, stage, _ = CASES[case]
    traffic = rank_traffic(sizes, layout_of(case), WORKLOAD, stage, pipeline_rank=0)
    assert traffic.tensor + traffic.context + traffic.experts == pytest.approx(measured[case][1], rel=0.01)
    if not measured[case][1]:
        assert traffic.total == 0


def layout_of(case: str) -> Layout:
    layout = Layout(**{"precision": "fp32", "transformer_impl": "local"} | CASES[case][2])
    ranks = max(1, layout.expert_model_parallel_size * layout.expert_tensor_ranks // layout.model_ranks)
    return replace(layout, data_parallel_size=ranks, global_batch_size=ranks)
