"""`benchmark.py gpu` without a GPU: it runs, and says of every figure that needs one that it was not run."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import TOOLS
from support.processes import run_forked, run_python

from neo_megatron.benchmarks import gpu_profile
from neo_megatron.benchmarks.gpu_profile import busy, kind_of, share_by_kind
from neo_megatron.benchmarks.gpu_steps import (
    ON_GPU,
    OURS,
    PLAIN,
    StepRun,
    flags,
    planned,
    runs,
    with_more_recomputed,
)

TOOL = TOOLS / "benchmark.py"


def test_the_command_without_a_gpu(tmp_path):
    done = run_forked(TOOL, "gpu", "--scratch", tmp_path / "scratch", "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout[-3000:]
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert not measured["on_gpu"] and measured["ceilings"]["product"] > 0
    assert [(step["who"], step["training_stage"]) for step in measured["steps"]] == [(OURS, 2), (PLAIN, 2), (OURS, 1)]
    every, plain, stage_one = measured["steps"]
    assert every["tokens"] == plain["tokens"] == 256 and every["flops"] == plain["flops"] > stage_one["flops"]
    # Random weights: all begin at the logarithm of the vocabulary of 512.
    assert [step["loss"] for step in measured["steps"]] == pytest.approx([6.24] * 3, abs=1)
    *_, targets = done.stdout.split("\n\n")
    assert targets.count("not run: no GPU") == 5 * len(ON_GPU.lengths)
    for run in runs(ON_GPU):
        row = f"| {run.who}, {run.precision}, stage {run.training_stage} | {run.length:,} | not run: no GPU |"
        assert done.stdout.count(row) == 1, row
    assert "| kernels by kind | not run: no GPU |" in done.stdout


def test_the_command_lines_on_a_gpu_are_accepted(tmp_path):
    """As Megatron and neo_megatron check them at start, with a GPU's defaults."""
    paths = os.pathsep.join([str(TOOL.parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = run_python(Path(__file__).parent / "flags_worker.py", tmp_path, environment={"PYTHONPATH": paths})
    assert done.returncode == 0 and "24 command lines" in done.stdout, done.stdout[-3000:]


KERNELS = {
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "products",
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128": "products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "products",
    "triton_tem_fused_flex_attention_backward_0": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
    "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctorMaster<float>>": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "triton_red_fused__log_softmax_nll_loss_3": "cross entropy",
    "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>": "norm, rotary",
    "norm_rotary_backward": "norm, rotary",
    "void transformer_engine::detail::cast_transpose_fused_kernel<...>": "FP8 casts",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "all else",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_by_kind(kernel):
    assert kind_of(kernel) == KERNELS[kernel]


def test_idle_time_counts_overlapping_kernels_once():
    assert busy([(0, 4), (2, 6), (3, 5), (8, 9)]) == 7
    shares = share_by_kind([("gemm", 0, 6), ("Memcpy HtoD", 4, 6), ("gemm", 9, 10)])
    assert shares == pytest.approx({"products": 0.7, "copies": 0.2, "idle": 0.3})


def test_layers_are_recomputed_where_the_plan_does_not_fit():
    run = StepRun(OURS, "bf16", 2, 16384)
    assert planned(run, ON_GPU.sizes, memory=141e9) == 0
    assert 0 < planned(run, ON_GPU.sizes, memory=80e9) <= 40
    assert flags(StepRun(OURS, "delayed", 2, 8192, recomputed=10))[-6:] == [
        *("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "10"),
    ]


def test_after_running_out_of_memory_more_layers_are_recomputed_until_all_are():
    tried = [StepRun(OURS, "bf16", 2, 16384, recomputed=20)]
    while following := with_more_recomputed(tried[-1], ON_GPU.sizes):
        tried.append(following)
    assert [run.recomputed for run in tried] == [20, 30, 40]
    assert with_more_recomputed(StepRun(PLAIN, "bf16", 2, 8192), ON_GPU.sizes).recomputed == 40


def test_a_profile_counts_kernels_by_kind_and_waits_of_the_host(monkeypatch):
    def event(name, start, end, device="CUDA", annotation=False):
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), device_type=kind, is_user_annotation=annotation
        )

    class Profiler(nullcontext):
        def events(self):
            return [
                event("cudaLaunchKernel", 0, 1, "CPU"),
                event("nvjet_tst_128x256", 10, 40),
                event("ProfilerStep*", 0, 1000, annotation=True),
                event("cudaStreamSynchronize", 5, 45, "CPU"),
                event("triton_tem_fused_flex_attention_1", 50, 110),
                event("cudaStreamSynchronize", 100, 110, "CPU"),
                event("cudaDeviceSynchronize", 110, 111, "CPU"),
            ]

    monkeypatch.setattr(gpu_profile, "profile", lambda **_: Profiler(Profiler()))
    with gpu_profile.profiled() as measured:
        pass
    assert measured.kinds == pytest.approx({"attention": 0.6, "products": 0.3, "idle": 0.1})
    assert measured.waits == {"cudaStreamSynchronize": 2}
