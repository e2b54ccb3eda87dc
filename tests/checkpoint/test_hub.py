"""Models by their hub id, from a small hub of our own: what is fetched, what is refused, and without a network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint.hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.paths import TOOLS
from support.processes import run_python

from neo_megatron.checkpoint import hub
from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.errors import ConfigError

TOOL = TOOLS / "convert_checkpoint.py"


@pytest.fixture
def models(golden, tmp_path):
    """A NEO with its tokenizer and much else, one with pickled weights only, and one that nobody may have."""
    safe, pickled = tmp_path / "models" / "safe", tmp_path / "models" / "pickled"
    shutil.copytree(golden / "ckpt_untied", safe)
    shutil.copytree(golden / "tokenizer", safe, dirs_exist_ok=True)
    tensors = load_file(safe / "model.safetensors")
    for name in ("pytorch_model.bin", "optimizer.pt", "consolidated.safetensors", "README.md", "training.py"):
        (safe / name).write_bytes(b"not needed")
    pickled.mkdir()
    shutil.copy(safe / "config.json", pickled)
    torch.save(tensors, pickled / "pytorch_model.bin")
    return {"somebody/neo": safe, "somebody/old": pickled}


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    """huggingface_hub reads its variables when it is imported, so here it is told again."""
    with HubServer(models, gated=("somebody/closed",)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_only_the_files_that_are_needed_are_fetched(server, golden):
    directory = hub.model_directory("somebody/neo@v2")
    tokenizer = {path.name for path in (golden / "tokenizer").iterdir()}
    assert set(server.served) == {"config.json", "model.safetensors"} | tokenizer
    assert open_neo(directory).sizes == open_neo(golden / "ckpt_untied").sizes
    fetched = len(server.served)
    assert hub.model_directory("somebody/neo@v2") == directory and len(server.served) == fetched


def test_a_tokenizer_comes_without_its_model(server):
    directory = hub.tokenizer_directory("somebody/neo")
    assert (directory / "tokenizer.json").is_file() and "model.safetensors" not in server.served


def test_a_run_fetches_only_the_configuration(server, golden):
    assert sizes_of("somebody/neo") == open_neo(golden / "ckpt_untied").sizes
    assert server.served == ["config.json"]
    with pytest.raises(ConfigError, match="--neo-model nobody/nothing: nobody/nothing: neither a directory here"):
        sizes_of("nobody/nothing")


def test_shards_are_found_through_their_index(server, models):
    tensors = load_file(models["somebody/neo"] / "model.safetensors")
    (models["somebody/neo"] / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, models["somebody/neo"] / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (models["somebody/neo"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_neo(hub.model_directory("somebody/neo")).source
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_pickled_weights_only_when_asked_for(server, golden):
    with pytest.raises(ValueError, match="no safetensors weights there; pickled ones are fetched with --allow-pickle"):
        hub.model_directory("somebody/old")
    assert "pytorch_model.bin" not in server.served
    directory = hub.model_directory("somebody/old", allow_pickle=True)
    with pytest.raises(ValueError, match="its weights are pickled"):
        open_neo(directory)
    source = open_neo(directory, allow_pickle=True).source
    expected = load_file(golden / "ckpt_untied" / "model.safetensors")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("nobody/nothing", "nobody/nothing: neither a directory here nor a model on http"),
        ("somebody/closed", "somebody/closed: its owners must grant access: request it"),
        ("somebody/neo@v9", "somebody/neo@v9: the model has no revision v9"),
    ],
)
def test_failures_of_the_hub_are_one_sentence(server, name, sentence):
    with pytest.raises(hub.HubError, match=sentence) as refused:
        hub.model_directory(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nowhere", "./some/where", "../neo", "/some/where", "a/b/c", ".hidden/neo"])
def test_a_path_is_never_looked_up_on_the_hub(server, name):
    assert hub.model_directory(name) == Path(name)


def test_a_local_directory_wins_over_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "neo").mkdir(parents=True)
    assert hub.model_directory("somebody/neo") == Path("somebody/neo") and not server.served


def test_the_cache_serves_without_a_network(server, tmp_path, monkeypatch):
    directory = hub.model_directory("somebody/neo")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    assert hub.model_directory("somebody/neo") == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.model_directory("somebody/neo") == directory
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(hub.HubError, match="somebody/neo: no directory here, and http.* did not give it"):
        hub.model_directory("somebody/neo")


@pytest.mark.slow
def test_the_command_takes_an_id(models, tmp_path):
    with HubServer(models) as server:
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.address}
        command = ("hf-to-megatron", "--hf", "somebody/neo", "--output", tmp_path / "megatron")
        done = run_python(TOOL, *command, environment=environment)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "megatron" / "release" / ".metadata").is_file()
