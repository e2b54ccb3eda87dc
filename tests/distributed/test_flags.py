"""Flags of Megatron that no other test gives: each does what it says, or leaves the losses of a run as they are.

`flag_table.py` says which test shows what; here all start from the golden checkpoint and take three steps.
"""

import gzip
import json
import shlex
from pathlib import Path

import pytest
import torch
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory

TP2, PP2 = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
CONSTANT = "--lr-decay-style constant --clip-grad 0 --save {directory}/saved --save-interval 1"

# What a run computes stays the same, however it is computed, checked, reported or saved.
SAME = (
    "--manual-gc --manual-gc-interval 1 --no-manual-gc-eval --disable-jit-fuser --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --mlp-chunks-for-training 2 --recompute-granularity selective --recompute-modules mlp "
    "core_attn --use-cpu-initialization --no-initialization --no-check-for-nan-in-loss-and-grad "
    "--check-for-large-grads --rerun-mode disabled --timing-log-level 2 --timing-log-option all "
    "--no-barrier-with-level-1-timing --logging-level 20 --distributed-timeout-seconds-after-init 100 "
    "--save {directory}/saved --dist-ckpt-workers 1 --no-ckpt-fully-parallel-save "
    "--ckpt-assume-constant-structure --no-save-rng --log-progress --exit-interval 2"
)
LOADED = (
    "--load {room}/flags/same/saved --ckpt-fully-parallel-load-exchange-algo gather_rounds "
    "--no-ckpt-load-validate-sharding-integrity --dist-ckpt-strictness log_all --exit-on-missing-checkpoint "
    "--no-load-rng --recompute-activations"
)
LOGGED = (
    "--log-params-norm --log-num-zeros-in-grad --log-world-size-to-tensorboard --log-timers-to-tensorboard "
    "--log-throughput --no-log-loss-scale-to-tensorboard --tensorboard-log-interval 2 --tensorboard-queue-size 1 "
    "--valid-data-path {room}/packs --eval-iters 1 --eval-interval 1 --eval-micro-batch-size 2 "
    "--eval-global-batch-size 8 --log-validation-ppl-to-tensorboard"
)
PROFILED = (
    "--profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2 --profile-ranks 0 "
    "--pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra"
)
DISTRIBUTED = (
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --no-align-grad-reduce "
    "--no-align-param-gather --ddp-bucket-size 10000 --ddp-pad-buckets-for-high-nccl-busbw --data-parallel-random-init "
    "--check-weight-hash-across-dp-replicas-interval 1 --distrib-optim-fully-reshardable-mem-efficient "
    "--save {directory}/saved"
)
BF16_GRADIENTS = (
    "--bf16 --grad-reduce-in-bf16 --use-distributed-optimizer --overlap-grad-reduce --ddp-num-buckets 3 "
    "--ddp-reduce-scatter-with-fp32-accumulation --cross-entropy-loss-fusion"
)
LOCAL_FP32 = "--bf16 --grad-reduce-in-bf16 --ddp-param-name-patterns-for-fp32-local-accumulation all"

# Name -> processes, flags.
RUNS = {
    "plain": (1, ""),
    "same": (1, SAME),
    "loaded": (1, LOADED),
    "loaded-weights": (1, "--load {room}/flags/same/saved --no-load-optim"),
    "logged": (1, LOGGED),
    "profiled": (1, PROFILED),
    "adam": (1, f"{CONSTANT} --train-iters 1 --adam-eps 1e-3 --weight-decay 0.5 --decoupled-lr 1e-2"),
    "sgd": (1, f"{CONSTANT} --train-iters 2 --optimizer sgd --sgd-momentum 0.5 --weight-decay 0.5"),
    "written": (
        1,
        "--save {directory}/saved --save-wgrads-interval 1 --save-params-interval 1 "
        "--dump-param-to-param-group-map {directory}/groups --no-save-optim --train-iters 1",
    ),
    "dropout": (1, "--hidden-dropout 0.1"),
    "dropout-seed": (1, "--hidden-dropout 0.1 --seed 7"),
    "small": (
        1,
        "--init-method-std 0.01 --embedding-init-method-std 0.5 --save {directory}/saved --lr 1e-12 --train-iters 1",
    ),
    "fp16": (1, "--fp16 --initial-loss-scale 64 --loss-scale-window 1 --hysteresis 1 --min-loss-scale 1"),
    "fp16-constant": (1, "--fp16 --loss-scale 64 --accumulate-allreduce-grads-in-fp32"),
    "over": (1, "--exit-duration-in-mins -1"),
    "samples": (1, "--train-samples 12"),
    "growing": (1, "--train-samples 20 --step-batch-size-schedule '0:4 1536:8'"),
    "skip": (1, "--iterations-to-skip 2"),
    "bf16": (1, "--bf16"),
    "distributed": (2, DISTRIBUTED),
    "bf16-gradients": (2, BF16_GRADIENTS),
    "local-fp32": (2, LOCAL_FP32),
    "distributed-activations": (
        2,
        "--tensor-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1 --distribute-saved-activations",
    ),
    "skip-tp2": (2, f"{TP2} --iterations-to-skip 2 --no-clone-scatter-output-in-embedding"),
    "skip-vp2": (
        2,
        f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-virtual-pipeline-stage 4 "
        "--iterations-to-skip 2",
    ),
}


@pytest.fixture(scope="module")
def runs(room) -> dict[str, Job]:
    """All of them, in one launch for each number of processes."""

    def job(name: str, flags: str) -> Job:
        directory = room / "flags" / name
        words = shlex.split(flags.format(room=room, directory=directory))
        return Job(directory, [*command(room, words), *words], gradients=name in ("adam", "sgd", "written"))

    jobs = {name: job(name, flags) for name, (_, flags) in RUNS.items()}
    for processes in (1, 2):
        run_jobs(processes, [jobs[name] for name, (ranks, _) in RUNS.items() if ranks == processes])
    return jobs


def command(room: Path, flags: list[str]) -> list[str]:
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs", "--num-workers", "0"),
        *("--micro-batch-size", "1", "--lr", "1e-3", "--log-interval", "1"),
        *(() if "--init-method-std" in flags else ("--pretrained-checkpoint", f"{room}/golden")),
        *(() if "--train-samples" in flags else ("--train-iters", "3", "--lr-warmup-iters", "0")),
        *(() if "--step-batch-size-schedule" in flags else ("--global-batch-size", "4")),
    ]


def losses(job: Job) -> dict[int, float]:
    return {step: values[0] for step, values in job.scalars("lm loss").items()}


def test_what_only_changes_how_a_run_computes_leaves_its_losses(runs):
    plain = losses(runs["plain"])
    assert set(plain) == {1, 2, 3}
    assert losses(runs["same"]) == {step: pytest.approx(plain[step], rel=2e-6) for step in (1, 2)}
    assert losses(runs["loaded"]) == {3: pytest.approx(plain[3], rel=2e-6)}
    assert losses(runs["loaded-weights"])[3] == pytest.approx(plain[3], rel=2e-6), "of the weights before the step"
    assert losses(runs["distributed"]) == pytest.approx(plain, rel=2e-6)
    assert losses(runs["distributed-activations"]) == pytest.approx(plain, rel=2e-6)
    assert "Weight hashes match after 3 iterations" in runs["distributed"].printed()
    progress = (runs["same"].directory / "saved" / "progress.txt").read_text()
    assert "Saved checkpoint" in progress and "Iteration: 2" in progress


def test_gradients_are_scaled_where_they_are_clipped(runs):
    """Without a pass of their own, but for those that are not clipped, or are looked at or written before."""
    passes = {name: run.passes()["scalings"] for name, run in runs.items()}
    assert all(passes[name] == 0 for name in ("plain", "bf16", "distributed", "bf16-gradients", "local-fp32"))
    assert all(passes[name] > 0 for name in ("adam", "written", "fp16", "fp16-constant"))


def test_what_is_logged(runs, room):
    logged = runs["logged"]
    norms, zeros = logged.scalars("params-norm"), logged.scalars("num-zeros")
    assert set(norms) == set(zeros) == {2}, "every second step"
    before = TorchDistDirectory(room / "golden")
    norm = torch.stack([before.read(name).double().square().sum() for name in before.shapes]).sum().sqrt()
    assert norms[2][0] == pytest.approx(float(norm), rel=1e-2), "after two small steps"
    assert logged.scalars("world-size") == {2: [1.0]}
    assert {2, 3} <= set(logged.scalars("iteration-time")) and {2, 3} <= set(logged.scalars("throughput"))
    with pytest.raises(KeyError):
        logged.scalars("loss-scale")
    validation, perplexity = logged.scalars("lm loss validation"), logged.scalars("lm loss validation ppl")
    assert set(validation) == {1, 2, 3}
    assert perplexity[2][0] == pytest.approx(float(torch.tensor(validation[2][0]).exp()), rel=1e-4)


def test_a_profile_is_written(runs):
    packed = (runs["profiled"].directory / "torch_profile" / "rank-0.json.gz").read_bytes()
    profile = json.loads(gzip.decompress(packed))
    names = {event.get("name", "") for event in profile["traceEvents"]}
    assert "aten::mm" in names and any("neo_model.py" in name for name in names), "operations, and who called them"
    assert any("Input Dims" in event.get("args", {}) for event in profile["traceEvents"])
    assert list((runs["profiled"].directory / "chakra").iterdir())


def weights(job: Job, iteration: int) -> TorchDistDirectory:
    return TorchDistDirectory(job.directory / "saved" / f"iter_{iteration:07d}")


def test_adam_by_hand(runs, room):
    """The first step of each tensor: a sign softened by eps, decay of matrices alone, a rate for embedding and head."""
    before, after, gradients = (
        TorchDistDirectory(room / "golden"),
        weights(runs["adam"], 1),
        runs["adam"].read_gradients(),
    )
    assert len(gradients) > 20
    for name, gradient in gradients.items():
        old = before.read(name)
        rate = 1e-2 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else 1e-3
        decay = 0.5 * old if old.dim() > 1 else 0
        expected = old - rate * (gradient / (gradient.abs() + 1e-3) + decay)
        torch.testing.assert_close(after.read(name), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_sgd_by_hand(runs, room):
    """The second step: the gradient and half of what the first one added up to."""
    first, after, gradients = weights(runs["sgd"], 1), weights(runs["sgd"], 2), runs["sgd"].read_gradients()
    before = TorchDistDirectory(room / "golden")
    for name, gradient in gradients.items():
        old = first.read(name)
        momentum = 0.5 * (before.read(name) - old) / 1e-3
        expected = old - 1e-3 * (momentum + gradient + (0.5 * old if old.dim() > 1 else 0))
        torch.testing.assert_close(after.read(name), expected, rtol=1e-4, atol=2e-6, msg=name)


def test_gradients_and_parameters_are_written(runs):
    written, gradients = runs["written"].directory, runs["written"].read_gradients()
    chunk = torch.load(written / "saved" / "wgrads" / "iter_0000001" / "mp_rank_00.pth")["model_chunk0"]
    embedding = "embedding.word_embeddings.weight"
    torch.testing.assert_close(chunk[embedding], gradients[embedding])
    chunk = torch.load(written / "saved" / "params" / "iter_0000001" / "mp_rank_00.pth")["model_chunk0"]
    torch.testing.assert_close(chunk[embedding], weights(runs["written"], 1).read(embedding))
    assert list((written / "groups").iterdir())
    kept = [any(key.startswith("optimizer.") for key in weights(runs[name], 1).shapes) for name in ("adam", "written")]
    assert kept == [True, False], "as --no-save-optim asks"


def test_dropout_and_its_seed(runs):
    plain, dropped, again = (losses(runs[name])[1] for name in ("plain", "dropout", "dropout-seed"))
    assert abs(dropped - plain) > 1e-3 and abs(again - dropped) > 1e-3


def test_what_a_model_starts_from(runs):
    small = weights(runs["small"], 1)
    matrix, embedding = "decoder.layers.1.mlp.linear_fc2.weight", "embedding.word_embeddings.weight"
    assert float(small.read(matrix).std()) == pytest.approx(0.01, rel=0.1)
    assert float(small.read(embedding).std()) == pytest.approx(0.5, rel=0.1)


def test_float16_scales_its_loss(runs):
    plain = losses(runs["plain"])
    for name in ("fp16", "fp16-constant"):
        assert losses(runs[name]) == pytest.approx(plain, rel=5e-3)
    assert [scale for (scale,) in runs["fp16"].scalars("loss-scale").values()] == [128, 256, 512]
    assert set(runs["fp16-constant"].scalars("loss-scale")) == {1, 2, 3}
    assert all(scales == [64] for scales in runs["fp16-constant"].scalars("loss-scale").values())


def test_bfloat16_gradients(runs):
    """Reduced in bfloat16, or added up in float32 where the name matches: the run of float32 sums, rounded."""
    exact = losses(runs["bf16"])
    for name in ("bf16-gradients", "local-fp32"):
        assert losses(runs[name]) == pytest.approx(exact, rel=5e-3)


def test_how_long_a_run_is(runs):
    plain = losses(runs["plain"])
    assert losses(runs["over"]) == {1: pytest.approx(plain[1], rel=2e-6)}
    assert set(losses(runs["samples"])) == {1, 2, 3}
    assert losses(runs["samples"])[1] == pytest.approx(plain[1], rel=2e-6)


def test_batches_grow(runs):
    """4 packs to 8 packs of 192 tokens, then 8: the last step is a complete one though 20 packs end in its middle."""
    assert [size for (size,) in runs["growing"].scalars("batch-size").values()] == [4, 4, 8, 8]
    assert losses(runs["growing"])[1] == pytest.approx(losses(runs["plain"])[1], rel=2e-6)


def test_an_iteration_is_skipped_on_every_layout(runs):
    one = losses(runs["skip"])
    assert set(one) == {1, 3} and one[3] != pytest.approx(losses(runs["plain"])[3], rel=1e-3)
    for name in ("skip-tp2", "skip-vp2"):
        assert losses(runs[name]) == pytest.approx(one, rel=2e-6), name
