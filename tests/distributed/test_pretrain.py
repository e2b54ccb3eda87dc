"""`pretrain_neo` as a user runs it: real annotations through the tools, then training, saving, resuming, stopping.

Every layout starts from the golden checkpoint and must go the same way as one process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import boto3
import pytest
import torch
from conftest import GOLDEN, run_python, torchrun
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.pack_writer import PackInput, write_packs
from neo_megatron.data.preprocess import preprocess
from neo_megatron.data.registry import Source
from neo_megatron.data.settings import Settings
from neo_megatron.model.config import NeoSizes

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Packs of the golden documents, and the golden checkpoint in Megatron's form."""
    room = tmp_path_factory.mktemp("pretrain")
    golden = json.loads((GOLDEN / "meta.json").read_text())
    documents = golden["untied_pack1"]["docs"] + golden["untied_textonly"]["docs"]
    (room / "annotations.json").write_text(json.dumps(documents * 8))
    for command in (
        f"preprocess_data.py --input {room}/annotations.json --image-root {GOLDEN} --tokenizer {GOLDEN}/tokenizer "
        f"--output {room}/shards --min-pixels 4096 --max-pixels 65536 --workers 1",
        f"pack_data.py --data {room}/shards --output {room}/packs --seq-length 192",
    ):
        tool, *arguments = command.split()
        done = run_python(TOOLS / tool, *arguments)
        assert done.returncode == 0, done.stdout
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    return room


def command(room: Path, name: str, *flags: str, iterations: int = 4) -> list[str]:
    return [
        *("-m", "neo_megatron.pretrain_neo", "--neo-model", f"{GOLDEN}/ckpt_untied"),
        *("--train-data-path", f"{room}/packs"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", str(iterations)),
        *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "0"),
        *("--num-workers", "0", "--log-interval", "1"),
        *("--pretrained-checkpoint", f"{room}/golden", "--tensorboard-dir", f"{room}/{name}/events"),
        *flags,
    ]


def evaluation(room: Path) -> list[str]:
    return ["--valid-data-path", f"{room}/packs", "--eval-interval", "4", "--eval-iters", "1"]


def scalars(room: Path, name: str, tag: str) -> dict[int, list[float]]:
    """What was logged at each step; after the last one Megatron evaluates twice, on different packs."""
    events = EventAccumulator(str(room / name / "events"))
    events.Reload()
    values = defaultdict(list)
    for event in events.Scalars(tag):
        values[event.step].append(event.value)
    return values


@pytest.fixture(scope="module")
def one_process(room) -> str:
    """The run that the others are compared with. It saves in the middle and at the end."""
    torchrun(1, *command(room, "one", *evaluation(room), "--save", f"{room}/one/checkpoints", "--save-interval", "2"))
    return "one"


LAYOUTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2"),
    "pp2-pre-buffer": (2, "--pipeline-model-parallel-size 2 --pre-buffer-pipeline-stages 1"),
    "dp2": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "large-micro-batch": (1, "--micro-batch-size 2"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same_model(room, one_process, layout):
    """The loss is normalised over the global batch, so it does not matter how samples are spread."""
    processes, flags = LAYOUTS[layout]
    torchrun(processes, *command(room, layout, *evaluation(room), *flags.split()))
    for tag, tolerance in (("lm loss", 2e-6), ("grad-norm", 5e-5), ("lm loss validation", 2e-6)):
        expected, actual = scalars(room, one_process, tag), scalars(room, layout, tag)
        assert actual.keys() == expected.keys() and expected
        for step, value in expected.items():
            assert actual[step] == pytest.approx(value, rel=tolerance), (tag, step)


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


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_tied_head_on_another_pipeline_stage(room, tied, stage):
    """Embedding and head are two copies then, which must stay one parameter; in stage 1 both are frozen."""
    shared = ["--neo-model", str(tied), "--pretrained-checkpoint", f"{room}/tied-megatron", "--training-stage", stage]
    for name, processes, flags in (("tied-one", 1, ""), ("tied-pp2", *LAYOUTS["pp2-pre-buffer"])):
        torchrun(processes, *command(room, f"{name}-{stage}", *shared, *flags.split()))
    expected, actual = (scalars(room, f"{name}-{stage}", "lm loss") for name in ("tied-one", "tied-pp2"))
    assert actual.keys() == expected.keys() and expected
    for step, value in expected.items():
        assert actual[step] == pytest.approx(value, rel=2e-6), step


def test_bfloat16_starts_alike(room, one_process):
    """Loss and gradient of the first step. Later ones part: no bfloat16 weight of 0.5 can take a step of 1e-4."""
    torchrun(1, *command(room, "bf16", "--bf16", iterations=1))
    for tag, tolerance in (("lm loss", 5e-3), ("grad-norm", 2e-2)):
        expected, actual = scalars(room, one_process, tag)[1], scalars(room, "bf16", tag)[1]
        assert actual == pytest.approx(expected, rel=tolerance), tag


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(room, one_process):
    checkpoints = room / one_process / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    try:
        torchrun(1, *command(room, "resumed", "--load", str(checkpoints)))
    finally:
        (checkpoints / "latest_checkpointed_iteration.txt").write_text("4")
    expected, actual = scalars(room, one_process, "lm loss"), scalars(room, "resumed", "lm loss")
    assert set(actual) == {3, 4}
    assert actual == {step: expected[step] for step in actual}


def test_another_layout_takes_over(room, one_process):
    """Saved by one process; resumed, optimizer state included, with the pre-buffer on a pipeline stage of its own."""
    checkpoints = room / one_process / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    try:
        torchrun(2, *command(room, "taken-over", "--load", str(checkpoints), *LAYOUTS["pp2-pre-buffer"][1].split()))
    finally:
        (checkpoints / "latest_checkpointed_iteration.txt").write_text("4")
    expected, actual = scalars(room, one_process, "lm loss"), scalars(room, "taken-over", "lm loss")
    assert set(actual) == {3, 4}
    for step, value in actual.items():
        assert value == pytest.approx(expected[step], rel=2e-6)


def test_stage_1_changes_nothing_but_what_it_trains(room):
    output = torchrun(
        1, *command(room, "stage1", "--training-stage", "1", "--save", f"{room}/stage1/checkpoints", iterations=2)
    )
    assert "training stage 1" in output and "0 of" in output  # the list at start
    before, after = TorchDistDirectory(room / "golden"), TorchDistDirectory(room / "stage1" / "checkpoints")
    changed = {
        row.megatron
        for row in tensor_table(NeoSizes.from_hf_directory(GOLDEN / "ckpt_untied"))
        if not torch.equal(before.read(row.megatron), after.read(row.megatron))
    }
    native = ["linear_qk_hw", "q_layernorm_h", "q_layernorm_w", "k_layernorm_h", "k_layernorm_w"]
    post_llm = {f"decoder.layers.{n}.self_attention.{name}.weight" for n in (2, 3, 4) for name in native}
    front = {
        name for name in changed if name.startswith(("patch_embedding.", "decoder.layers.0.", "decoder.layers.1."))
    }
    assert changed == front | post_llm
    assert len(front) == 4 + 2 * 13


def test_sigterm_saves_and_exits(room):
    checkpoints = room / "stopped" / "checkpoints"
    arguments = command(room, "stopped", "--save", str(checkpoints), iterations=100000)
    environment = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29777", "RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        env={**os.environ, **environment, "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if " iteration        3/" in line:
            process.send_signal(signal.SIGTERM)
            break
    printed.append(process.stdout.read())
    assert process.wait(timeout=120) == 0, "".join(printed)[-3000:]
    saved = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 3
    assert "exiting program after receiving SIGTERM" in "".join(printed)


@pytest.fixture(scope="module")
def broken(room) -> Path:
    """Packs of a data set of which only headers were checked; one of its pictures is broken."""
    pictures = room / "broken-pictures"
    shutil.copytree(GOLDEN / "images", pictures / "images")
    damaged = pictures / "images" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    source = Source("broken", str(room / "annotations.json"), str(pictures))
    settings = Settings(min_pixels=4096, max_pixels=65536, check="header")
    preprocess([source], GOLDEN / "tokenizer", room / "broken-shards", settings)
    write_packs([PackInput(str(room / "broken-shards"))], room / "broken-packs", 192)
    return room / "broken-packs"


def test_a_broken_picture_stops_no_run_and_counts_nowhere(room, broken):
    """All pipeline stages agree on the weights, so that the losses do; and every broken sample is named once."""
    losses, named = [], []
    stages = ["--pipeline-model-parallel-size", "2", "--pre-buffer-pipeline-stages", "1"]
    for name, processes, layout in (("broken-one", 1, []), ("broken-pp2", 2, stages)):
        flags = [*("--train-data-path", str(broken)), *("--max-broken-samples", "0.5"), *layout]
        output = torchrun(processes, *command(room, name, *flags, iterations=2))
        losses.append(scalars(room, name, "lm loss"))
        named.append([line for line in output.splitlines() if "broken sample" in line])
    assert named[0] == named[1] and named[0] and "annotations.json, record" in named[0][0]
    for step, value in losses[0].items():
        assert losses[1][step] == pytest.approx(value, rel=2e-6)


def test_packs_in_object_storage_train_as_those_on_disk(room, one_process):
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
    torchrun(1, *command(room, "s3", *flags, iterations=2), environment=environment)
    server.stop()
    expected, actual = scalars(room, one_process, "lm loss"), scalars(room, "s3", "lm loss")
    assert set(actual) == {1, 2}
    assert actual == {step: expected[step] for step in actual}


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--seq-length", "256"], "holds packs of 192 tokens, --seq-length is 256"),
        (["--neo-model", "neo-3b"], "--neo-model neo-3b: neither a preset"),
        (["--pre-buffer-pipeline-stages", "1"], "--pre-buffer-pipeline-stages 1 with --pipeline-model-parallel-size 1"),
        (["--vocab-size", "1008"], "is of another model (vocab_size 1024 there, 1008 here)"),
        (["--train-data-path", "{broken}", "--max-broken-samples", "0"], "more than --max-broken-samples 0.0 allows"),
    ],
)
def test_a_mistake_ends_in_a_sentence(room, broken, flags, sentence):
    flags = [flag.format(broken=broken) for flag in flags]
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"), *command(room, "mistake", *flags)
    )
    assert done.returncode != 0
    assert sentence in done.stdout, done.stdout[-3000:]
    assert "pretrain_neo.py" not in done.stdout, "a traceback"
