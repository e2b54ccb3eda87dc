"""Megatron-FSDP trains, saves and resumes as plain data parallelism does, with each strategy of sharding.

The model has tied embeddings. One pack of four has an image, so that a rank has none in most micro-batches.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.layout_runs import SMALL, assert_same, layout_job, write_random_model
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source

TIED = SMALL.replace(tie_word_embeddings=True)
ZERO = {
    number: f"--use-megatron-fsdp --data-parallel-sharding-strategy {strategy}"
    for number, strategy in ((1, "optim"), (2, "optim_grads"), (3, "optim_grads_params"))
}
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
STAGE_1 = "--training-stage 1"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# Gradients are reduced, and parameters gathered, for few of them at a time.
SMALL_UNITS = "--suggested-communication-unit-size 20000"


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Four packs, of which one has an image, and a random model."""
    room = tmp_path_factory.mktemp("fsdp")
    answer = "It is so. " * 6
    annotations = [
        {
            "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": answer * (n + 1)}],
            **({"image": ["b.png"]} if n == 2 else {}),
        }
        for n in range(4)
    ]
    (room / "annotations.json").write_text(json.dumps(annotations))
    source = Source("fsdp", str(room / "annotations.json"), str(GOLDEN / "images"))
    preprocess([source], GOLDEN / "tokenizer", room / "shards", PreprocessConfig(min_pixels=4096, max_pixels=4096))
    write_packs([PackInput(str(room / "shards"))], room / "packs", 192)
    (room / "model").mkdir()
    write_random_model(room / "model", TIED)
    return room


def job(room: Path, name: str, flags: str, iterations: int = 3) -> Job:
    return layout_job(room / name, room / "model", room / "packs", flags, iterations)


def saving(room: Path, name: str) -> str:
    """Three steps, of which the second is saved as well as the last."""
    return f"--save {room}/{name}/saved --save-interval 2"


def resuming(room: Path, name: str) -> str:
    """From the second step of another run, whose third is computed again."""
    return f"--load {room}/{name}/saved --ckpt-step 2"


@pytest.fixture(scope="module")
def runs(room) -> dict[str, Job]:
    """On two ranks."""
    jobs = [
        job(room, "dp", f"{DISTRIBUTED} {saving(room, 'dp')}"),
        job(room, "zero-3", f"{ZERO[3]} {SMALL_UNITS} {saving(room, 'zero-3')}"),
        job(room, "stage-1-dp", STAGE_1),
        job(room, "stage-1-zero-1", f"{ZERO[1]} {STAGE_1}"),
        job(room, "zero-3-from-dp", f"{ZERO[3]} {resuming(room, 'dp')}"),
        job(room, "dp-from-zero-3", f"{DISTRIBUTED} {resuming(room, 'zero-3')}"),
    ]
    run_jobs(2, jobs)
    return {one.directory.name: one for one in jobs}


@pytest.fixture(scope="module")
def more_runs(room, runs) -> dict[str, Job]:
    """On two ranks, and on four."""
    stage_2 = f"--pretrained-checkpoint {room}/stage-1-zero-3/saved --pretrained-optimizer"
    jobs = [
        job(room, "zero-1", ZERO[1]),
        job(room, "zero-2", f"{ZERO[2]} --overlap-param-gather --micro-batch-size 2"),
        job(room, "zero-3-full", f"{ZERO[3]} {FULL}"),
        job(room, "stage-1-zero-2", f"{ZERO[2]} {STAGE_1}"),
        job(room, "stage-1-zero-3", f"{ZERO[3]} {STAGE_1} {saving(room, 'stage-1-zero-3')}"),
        job(room, "stage-2-dp", f"{DISTRIBUTED} {stage_2}"),
        job(room, "stage-2-zero-3", f"{ZERO[3]} {stage_2}"),
        job(room, "bf16-dp", f"{DISTRIBUTED} --bf16 {saving(room, 'bf16-dp')}"),
        job(room, "bf16-zero-3", f"{ZERO[3]} --bf16 {saving(room, 'bf16-zero-3')}"),
        job(room, "bf16-zero-2-from-zero-3", f"{ZERO[2]} --bf16 {resuming(room, 'bf16-zero-3')}"),
        job(room, "zero-1-from-zero-3", f"{ZERO[1]} {resuming(room, 'zero-3')}"),
        job(room, "tp2-from-zero-3", f"--tensor-model-parallel-size 2 {resuming(room, 'zero-3')}"),
        job(room, "pp2-from-zero-3", f"--pipeline-model-parallel-size 2 {resuming(room, 'zero-3')}"),
        job(room, "cp2-zero-3", f"{ZERO[3]} --context-parallel-size 2"),
        replace(job(room, "bad-number", ZERO[3]), gradients=False, spoilt=([1], math.nan, 9)),
    ]
    run_jobs(2, jobs)
    on_four = [
        job(room, "dp4-zero-3", ZERO[3]),
        job(room, "dp4-zero-2-from-zero-3", f"{ZERO[2]} {resuming(room, 'zero-3')}"),
        job(room, "cp2-dp2-zero-2", f"{ZERO[2]} --context-parallel-size 2"),
    ]
    run_jobs(4, on_four)
    return runs | {one.directory.name: one for one in (*jobs, *on_four)}


def assert_last_step_same(actual: Job, expected: Job) -> None:
    losses = actual.scalars("lm loss")
    assert losses.keys() == {3}
    assert losses[3] == pytest.approx(expected.scalars("lm loss")[3], abs=2e-6, rel=0)


def exported(room: Path, name: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    convert_megatron_to_hf(room / name / "saved", tmp_path / name, load_tokenizer(GOLDEN / "tokenizer"))
    return load_file(tmp_path / name / "model.safetensors")


@pytest.mark.parametrize(("run", "reference"), [("zero-3", "dp"), ("stage-1-zero-1", "stage-1-dp")])
def test_losses_and_gradients(runs, run, reference):
    assert_same(TIED, runs[run], runs[reference], loss=2e-6, gradient=1e-5)


@pytest.mark.parametrize(("run", "reference"), [("zero-3-from-dp", "dp"), ("dp-from-zero-3", "dp")])
def test_checkpoints_are_those_of_any_layout(runs, run, reference):
    assert_last_step_same(runs[run], runs[reference])
    assert "loaded for" in runs[run].printed()


def test_a_checkpoint_has_the_tensors_of_other_layouts_and_is_exported(room, runs, tmp_path):
    ours, others = (TorchDistDirectory(room / name / "saved" / "iter_0000003") for name in ("zero-3", "dp"))
    assert ours.shapes == others.shapes
    tensors, reference = (exported(room, name, tmp_path) for name in ("zero-3", "dp"))
    assert tensors.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.allclose(tensors[name], tensor, rtol=0, atol=2e-6), name


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("run", "reference"),
    [
        *((name, "dp") for name in ("zero-1", "zero-2", "zero-3-full", "cp2-zero-3", "dp4-zero-3", "cp2-dp2-zero-2")),
        *((name, "stage-1-dp") for name in ("stage-1-zero-2", "stage-1-zero-3")),
        ("stage-2-zero-3", "stage-2-dp"),
    ],
)
def test_losses_and_gradients_of_more_layouts(more_runs, run, reference):
    assert_same(TIED, more_runs[run], more_runs[reference], loss=2e-6, gradient=1e-5)


@pytest.mark.thorough
def test_bfloat16(more_runs):
    assert_same(TIED, more_runs["bf16-zero-3"], more_runs["bf16-dp"], loss=2e-3, gradient=5e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["zero-1", "tp2", "pp2", "dp4-zero-2"])
def test_checkpoints_resume_on_more_layouts(more_runs, run):
    assert_last_step_same(more_runs[f"{run}-from-zero-3"], more_runs["dp"])


@pytest.mark.thorough
def test_float32_weights_of_bfloat16_are_resumed(more_runs):
    assert_last_step_same(more_runs["bf16-zero-2-from-zero-3"], more_runs["bf16-zero-3"])


@pytest.mark.thorough
def test_a_number_that_is_not_finite_ends_a_run_before_the_weights_change(more_runs):
    sentence = more_runs["bad-number"].exit()
    assert sentence.startswith("pretrain_neo: step 1: the loss is NaN or infinite on rank ")
    assert "and again when the step was computed a second time; it comes from pack " in sentence
