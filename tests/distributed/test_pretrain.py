"""`pretrain_neo` as a user runs it: real annotations through the tools, then training.

All start from the golden checkpoint. That every layout trains the same model is held by `test_layouts.py`, that a run
goes on after any end by `test_run_checkpoints.py`.
"""

import json
import shutil
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.model.core_attention import attention_pairs, build_mask
from neo_megatron.model.mask import AttentionRule


def command(room: Path, *flags: str, iterations: int = 4) -> list[str]:
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", str(iterations)),
        *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "0"),
        *("--num-workers", "0", "--log-interval", "1"),
        *("--pretrained-checkpoint", f"{room}/golden"),
        *flags,
    ]


@pytest.fixture(scope="module")
def tied(room) -> Path:
    """The golden model with its embedding as its head, in both forms; NEO-2B is such a model."""
    directory = room / "tied"
    directory.mkdir()
    config = json.loads((GOLDEN / "ckpt_untied" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(GOLDEN / "ckpt_untied" / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    convert_hf_to_megatron(directory, room / "tied-megatron")
    return directory


PP2 = ["--pipeline-model-parallel-size", "2", "--pre-buffer-pipeline-stages", "1"]
MISTAKES = {
    "length": (["--seq-length", "256"], "holds packs of 192 tokens, --seq-length is 256"),
    "model": (["--neo-model", "neo-3b"], "--neo-model neo-3b: neither a preset"),
    "stages": (
        ["--pre-buffer-pipeline-stages", "1"],
        "--pre-buffer-pipeline-stages 1 with --pipeline-model-parallel-size 1",
    ),
    "vocabulary": (["--vocab-size", "1008"], "is of another model (vocab_size 1024 there, 1008 here)"),
    "images": (
        ["--train-data-path", "{broken}", "--max-broken-samples", "0"],
        "more than --max-broken-samples 0.0 allows",
    ),
}


@pytest.fixture(scope="module")
def runs(room, tied, broken) -> dict[str, Job]:
    """Runs that need nothing but a start, in one launch for each number of processes."""

    def job(name: str, *flags: str, iterations: int = 4) -> Job:
        return Job(room / name, command(room, *flags, iterations=iterations))

    def tied_head(stage: str) -> list[str]:
        return ["--neo-model", str(tied), "--pretrained-checkpoint", f"{room}/tied-megatron", "--training-stage", stage]

    few = ["--train-data-path", str(broken), "--max-broken-samples", "0.5"]
    one = [
        job("one"),
        job("bf16", "--bf16", iterations=1),
        job("stage1", "--training-stage", "1", "--save", f"{room}/stage1/checkpoints", iterations=2),
        job("tied-1-one", *tied_head("1")),
        job("tied-2-one", *tied_head("2")),
        job("broken-one", *few, iterations=2),
        *(
            job(f"mistake-{name}", *(flag.format(broken=broken) for flag in flags))
            for name, (flags, _) in MISTAKES.items()
        ),
    ]
    two = [
        job("tied-1-pp2", *tied_head("1"), *PP2),
        job("tied-2-pp2", *tied_head("2"), *PP2),
        job("broken-pp2", *few, *PP2, iterations=2),
    ]
    run_jobs(1, one)
    run_jobs(2, two)
    return {run.directory.name: run for run in (*one, *two)}


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_tied_head_on_another_pipeline_stage(runs, stage):
    """Embedding and head are two copies then, which must stay one parameter; in stage 1 both are frozen."""
    expected, actual = (runs[f"tied-{stage}-{layout}"].scalars("lm loss") for layout in ("one", "pp2"))
    assert actual.keys() == expected.keys() and expected
    for step, value in expected.items():
        assert actual[step] == pytest.approx(value, rel=2e-6), step


def test_work_of_attention_is_logged(room, runs):
    """Pairs computed for each that is allowed, of all packs of a step, whatever the layout."""
    packs = PackDataset(room / "packs", 16, seed=1234, loss_weighting="square", images="none")
    masks = [AttentionRule(*(packs[i][name][None] for name in ("document", "image"))) for i in range(16)]
    pairs = torch.stack([attention_pairs(build_mask(rule, torch.float32)) for rule in masks]).view(4, 4, 2).sum(dim=1)
    assert pairs[:, 1].tolist() == [sum(rule.dense().sum() for rule in masks[i : i + 4]) for i in range(0, 16, 4)]
    expected = {step: [pytest.approx(float(computed / allowed))] for step, (computed, allowed) in enumerate(pairs, 1)}
    for name in ("one", "tied-2-pp2"):
        assert runs[name].scalars("attention/computed-to-allowed ratio") == expected
    assert "computed-to-allowed attention pair ratio: 1." in runs["one"].printed()


def test_bfloat16_starts_alike(runs):
    """Loss and gradient of the first step. Later ones part: no bfloat16 weight of 0.5 can take a step of 1e-4."""
    for tag, tolerance in (("lm loss", 5e-3), ("grad-norm", 2e-2)):
        expected, actual = (runs[name].scalars(tag)[1] for name in ("one", "bf16"))
        assert actual == pytest.approx(expected, rel=tolerance), tag


def test_stage_1_changes_nothing_but_what_it_trains(room, runs):
    output = runs["stage1"].printed()
    assert "training stage 1" in output and "0 of" in output  # the list at start
    before, after = TorchDistDirectory(room / "golden"), TorchDistDirectory(room / "stage1" / "checkpoints")
    changed = {
        row.megatron
        for row in tensor_table(read_sizes(GOLDEN / "ckpt_untied"))
        if not torch.equal(before.read(row.megatron), after.read(row.megatron))
    }
    native = ["linear_qk_hw", "q_layernorm_h", "q_layernorm_w", "k_layernorm_h", "k_layernorm_w"]
    post_llm = {f"decoder.layers.{n}.self_attention.{name}.weight" for n in (2, 3, 4) for name in native}
    front = {
        name for name in changed if name.startswith(("patch_embedding.", "decoder.layers.0.", "decoder.layers.1."))
    }
    assert changed == front | post_llm
    assert len(front) == 4 + 2 * 13


@pytest.fixture(scope="module")
def broken(room) -> Path:
    """Packs of a data set of which only headers were checked; one of its images is broken."""
    images = room / "broken-images"
    shutil.copytree(GOLDEN / "images", images / "images")
    damaged = images / "images" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    source = Source("broken", str(room / "annotations.json"), str(images))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=65536, check="header")
    preprocess([source], GOLDEN / "tokenizer", room / "broken-shards", settings)
    write_packs([PackInput(str(room / "broken-shards"))], room / "broken-packs", 192)
    return room / "broken-packs"


def test_a_broken_image_stops_no_run_and_counts_nowhere(runs):
    """All pipeline stages agree on the weights, so that the losses do; and every broken sample is named once."""
    one, pp2 = runs["broken-one"], runs["broken-pp2"]
    named = [
        [line for rank in range(ranks) for line in job.printed(rank).splitlines() if "broken sample" in line]
        for job, ranks in ((one, 1), (pp2, 2))
    ]
    assert named[0] == named[1] and named[0] and "annotations.json, record" in named[0][0]
    actual = pp2.scalars("lm loss")
    for step, value in one.scalars("lm loss").items():
        assert actual[step] == pytest.approx(value, rel=2e-6)


def test_packs_in_object_storage_train_as_those_on_disk(room, runs):
    """Two workers of the loader read through the cache and by range."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        **{"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        **{"AWS_DEFAULT_REGION": "us-east-1", "NEO_CACHE_DIR": f"{room}/cache"},
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="data")
    for path in [*(room / "shards").iterdir(), *(room / "packs").iterdir()]:
        client.upload_file(str(path), "data", str(path.relative_to(room)))
    flags = ["--train-data-path", "s3://data/packs", "--num-workers", "2"]
    stored = Job(room / "s3", command(room, *flags, iterations=2))
    run_jobs(1, [stored], environment=environment)
    server.stop()
    expected, actual = runs["one"].scalars("lm loss"), stored.scalars("lm loss")
    assert set(actual) == {1, 2}
    assert actual == {step: expected[step] for step in actual}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_a_sentence(runs, name):
    ended, sentence = runs[f"mistake-{name}"].exit(), MISTAKES[name][1]
    assert isinstance(ended, str) and ended.startswith("pretrain_neo: ") and sentence in ended
