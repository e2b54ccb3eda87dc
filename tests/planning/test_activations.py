"""Planned bytes of activations and of traffic against those that a real model keeps and sends on a CPU."""

import json
from dataclasses import asdict
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
MODEL = SIZES["tiny"].replace(
    num_attention_heads=4, head_dim=32, ffn_hidden_size=384, vocab_size=1024, pre_buffer_layers=2, post_llm_layers=3
)
SELECTIVE = dict(recompute_granularity="selective")
FULL = dict(recompute_granularity="full", recompute_num_layers=2)
SHARED = dict(tensor_model_parallel_size=2, sequence_parallel=True)
STAGE_2: dict[str, dict] = {
    "all kept": dict(),
    "core_attn": dict(**SELECTIVE, recompute_modules=("core_attn",)),
    "mlp": dict(**SELECTIVE, recompute_modules=("mlp",)),
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
STAGE_1 = ("all kept", "core_attn", "TP2 with SP", "TP2 with SP, full, block", "CP2, keys gathered", "bf16")
CASES = {f"stage 2, {name}": (2, settings) for name, settings in STAGE_2.items()}
CASES |= {f"stage 1, {name}": (1, STAGE_2[name]) for name in STAGE_1}


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, float]]:
    cases = []
    for stage, settings in CASES.values():
        settings = dict(settings)
        settings["bf16"] = settings.pop("precision", "fp32") == "bf16"
        ranks = {
            "tensor": settings.pop("tensor_model_parallel_size", 1),
            "context": settings.pop("context_parallel_size", 1),
        }
        case = {"sizes": asdict(MODEL), "stage": stage, "batch": (LENGTH, IMAGE_TOKENS, TRAINED), "settings": settings}
        cases.append(case | ranks)
    done = run_forked(Path(__file__).parent / "activation_worker.py", json.dumps(cases))
    assert done.returncode == 0, done.stdout[-6000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_activations_are_within_a_tenth_of_what_is_kept(case, measured):
    stage, layout = CASES[case][0], layout_of(case)
    [[chunk]] = layout.chunks(MODEL)
    assert chunk_bytes(MODEL, layout, WORKLOAD, chunk, stage) == pytest.approx(measured[case][0], rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_traffic_is_what_is_sent(case, measured):
    """But for a few numbers a token: of the cross entropy, and of positions under context parallelism."""
    traffic = rank_traffic(MODEL, layout_of(case), WORKLOAD, CASES[case][0], pipeline_rank=0)
    assert traffic.tensor + traffic.context == pytest.approx(measured[case][1], rel=0.01)
    if not measured[case][1]:
        assert traffic.total == 0


def layout_of(case: str) -> Layout:
    return Layout(**{"precision": "fp32", "transformer_impl": "local"} | CASES[case][1])
