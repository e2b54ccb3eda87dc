"""Hugging Face -> Megatron -> Hugging Face: the same bytes, complete or not at all, and no input is trusted."""

import dataclasses
import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_forked
from torch.distributed.checkpoint import FileSystemReader

from neo_megatron.checkpoint import to_hf
from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.hf_directory import SafetensorsDirectory
from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory, write_torch_dist
from neo_megatron.model.config import NeoSizes

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
LAST_NORM = "language_model.model.norm.weight"


@pytest.fixture
def megatron(golden, tmp_path) -> Path:
    """The golden checkpoint in Megatron's form."""
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    return tmp_path / "megatron"


def to_bfloat16(tensors):
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def tie(tensors):
    del tensors[HEAD]


def repeat_embedding_as_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


@pytest.mark.parametrize(
    "change, tied", [(lambda tensors: None, False), (to_bfloat16, False), (tie, True), (repeat_embedding_as_head, True)]
)
def test_the_same_bytes_come_back(variant, tokenizer, tmp_path, change, tied):
    source = variant(change, tie_word_embeddings=tied)
    convert_hf_to_megatron(source, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer)
    expected, actual = (load_file(path / "model.safetensors") for path in (source, tmp_path / "hf"))
    if tied:
        expected.pop(HEAD, None)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert NeoSizes.from_hf(config) == read_sizes(source)
    assert config["dtype"] == str(actual[LAST_NORM].dtype).removeprefix("torch.")


def test_shards_and_their_index(golden, megatron, tokenizer, tmp_path):
    """Small files out, and in again."""
    convert_megatron_to_hf(megatron, tmp_path / "hf", tokenizer, shard_bytes=300_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 310_000 for file in files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "again")
    convert_megatron_to_hf(tmp_path / "again", tmp_path / "complete", tokenizer)
    expected, actual = (
        load_file(path / "model.safetensors") for path in (golden / "ckpt_untied", tmp_path / "complete")
    )
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_what_megatron_loads_and_saves(tied, tokenizer, tmp_path):
    """The tied model: Megatron's model takes our checkpoint, and we take Megatron's, optimizer state and all."""
    convert_hf_to_megatron(tied, tmp_path / "in")
    (tmp_path / "out").mkdir()
    worker = Path(__file__).parent / "megatron_worker.py"
    done = run_forked(worker, tied, tmp_path / "in" / "release", tmp_path / "out")
    assert done.returncode == 0, done.stdout[-4000:]
    convert_megatron_to_hf(tmp_path / "out", tmp_path / "hf", tokenizer)
    expected, actual = (load_file(path / "model.safetensors") for path in (tied, tmp_path / "hf"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name):
    return lambda tensors: tensors.update({name: torch.zeros(3)})


def reshape(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    "change, sentence",
    [
        (drop(HEAD), f"lacks {HEAD}"),
        (drop("language_model.model.layers.4.self_attn.k_norm_w.weight"), "lacks .*layers.4.self_attn.k_norm_w.weight"),
        (add("language_model.model.layers.5.mlp.up_proj.weight"), "the unexpected .*layers.5.mlp.up_proj.weight"),
        (reshape(LAST_NORM), rf"has {LAST_NORM} of shape \[63\] instead of \[64\]"),
    ],
)
def test_missing_and_unexpected_tensors_are_refused_by_from_hf(variant, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert_hf_to_megatron(variant(change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_must_be_the_embedding(variant, tmp_path):
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}"):
        convert_hf_to_megatron(variant(tie_word_embeddings=True), tmp_path / "out")


def rewrite(megatron, change, without=(), **neo_sizes) -> None:
    """Saves the golden checkpoint again with other tensors or sizes, or without some sizes."""
    saved = TorchDistDirectory(megatron)
    tensors = {key: saved.read(key) for key in saved.shapes}
    state = saved.common_state()
    change(tensors)
    state["args"].neo_sizes |= neo_sizes
    for name in without:
        del state["args"].neo_sizes[name]
    shutil.rmtree(megatron / "release")
    (megatron / "release").mkdir()
    stored = [StoredTensor(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    write_torch_dist(megatron / "release", stored, tensors.values(), state)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (drop("decoder.layers.2.mlp.linear_fc1.weight"), "lacks decoder.layers.2.mlp.linear_fc1.weight"),
        (add("decoder.layers.9.mlp.linear_fc1.weight"), "unexpected decoder.layers.9.mlp.linear_fc1.weight"),
        (reshape("output_layer.weight"), r"output_layer.weight of shape \[1023, 64\] instead of \[1024, 64\]"),
    ],
)
def test_missing_and_unexpected_tensors_are_refused_by_to_hf(megatron, tokenizer, tmp_path, change, sentence):
    rewrite(megatron, change)
    with pytest.raises(ValueError, match=sentence):
        convert_megatron_to_hf(megatron, tmp_path / "out", tokenizer)


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"gates": 2}, "release: its sizes and ours differ in gates: use the version that saved it"),
        ({"num_query_groups": 3}, "release: .*num_query_groups"),
    ],
)
def test_impossible_saved_sizes_are_named(megatron, tokenizer, tmp_path, sizes, sentence):
    rewrite(megatron, lambda tensors: None, **sizes)
    with pytest.raises(ValueError, match=sentence):
        convert_megatron_to_hf(megatron, tmp_path / "out", tokenizer)


def test_a_checkpoint_of_version_0_1_is_read(golden, megatron, tokenizer, tmp_path):
    """It has no fields for what came with later models of the family."""
    new = ("attention_form", "num_experts", "experts_per_token", "expert_ffn_hidden_size", "norm_topk_prob")
    rewrite(megatron, lambda tensors: None, without=new)
    convert_megatron_to_hf(megatron, tmp_path / "out", tokenizer)
    assert read_sizes(tmp_path / "out") == read_sizes(golden / "ckpt_untied")
    rewrite(megatron, lambda tensors: None, without=("head_dim",))
    with pytest.raises(ValueError, match="its sizes and ours differ in head_dim"):
        convert_megatron_to_hf(megatron, tmp_path / "again", tokenizer)


def test_the_tokenizer_must_be_the_models(megatron, tokenizer, tmp_path):
    rewrite(megatron, lambda tensors: None, image_context_token_id=895)
    with pytest.raises(ValueError, match="<IMG_CONTEXT> has the id 896, the model was trained with 895"):
        convert_megatron_to_hf(megatron, tmp_path / "out", tokenizer)


def test_an_interrupted_conversion_leaves_no_checkpoint(megatron, tokenizer, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(to_hf, "write_companions", interrupted)
        convert_megatron_to_hf(megatron, tmp_path / "hf", tokenizer)
    assert not (tmp_path / "hf").exists() and (tmp_path / "hf.partial").exists()
    convert_megatron_to_hf(megatron, tmp_path / "hf", tokenizer)
    assert (tmp_path / "hf" / "config.json").exists() and not (tmp_path / "hf.partial").exists()
    with pytest.raises(ValueError, match="exists already"):
        convert_megatron_to_hf(megatron, tmp_path / "hf", tokenizer)


def test_an_incomplete_tensor_is_refused(megatron):
    """A lost rank leaves pieces out; memory of whatever was there before must not pass for weights."""
    metadata = FileSystemReader(megatron / "release").read_metadata()
    (megatron / "release" / "checksums.json").unlink()  # or they would tell
    entry = metadata.state_dict_metadata["output_layer.weight"]
    entry.chunks[0] = dataclasses.replace(entry.chunks[0], sizes=torch.Size([512, 64]))
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="the pieces of output_layer.weight do not make up the tensor"):
        TorchDistDirectory(megatron).read("output_layer.weight")


class Exploit:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_cannot_run_anything(megatron, tokenizer, tmp_path):
    mark = tmp_path / "ran"
    rewrite(megatron, lambda tensors: None, hidden_size=Exploit(mark))
    with pytest.raises(ValueError, match="more than Megatron allows"):
        convert_megatron_to_hf(megatron, tmp_path / "out", tokenizer)
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(Exploit(mark)))
    with pytest.raises(ValueError, match="it wants"):
        convert_megatron_to_hf(megatron, tmp_path / "out", tokenizer)
    assert not mark.exists()


def test_paths_cannot_leave_the_checkpoint(megatron, golden, tmp_path):
    metadata = FileSystemReader(megatron / "release").read_metadata()
    (megatron / "release" / "checksums.json").unlink()  # or they would tell
    metadata.storage_data = {
        index: dataclasses.replace(place, relative_path="../../secret")
        for index, place in metadata.storage_data.items()
    }
    (tmp_path / "secret").write_bytes(b"")
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="names '../../secret', which is not a file of this directory"):
        TorchDistDirectory(megatron)
    (megatron / "latest_checkpointed_iteration.txt").write_text("../../elsewhere")
    with pytest.raises(ValueError, match="does not name an iteration"):
        TorchDistDirectory(megatron)
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="'../x.safetensors' is not a safetensors file of this directory"):
        SafetensorsDirectory(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["x.safetensors"], "b": 1}}')
    with pytest.raises(ValueError, match="is not a safetensors file of this directory"):
        SafetensorsDirectory(directory)


def test_broken_input_is_named(golden, tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        SafetensorsDirectory(golden)
    (tmp_path / "model.safetensors").write_bytes((golden / "ckpt_untied" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
        SafetensorsDirectory(tmp_path)
    with pytest.raises(ValueError, match="config.json: no such file"):
        convert_hf_to_megatron(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="not a Megatron checkpoint: convert it first"):
        TorchDistDirectory(tmp_path)


def test_common_state_is_what_megatron_compares(megatron, golden):
    """`megatron.training` reads these attributes of ``args`` when it loads."""
    sizes = read_sizes(golden / "ckpt_untied")
    state = TorchDistDirectory(megatron).common_state()
    args = state["args"]
    assert isinstance(args, Namespace) and NeoSizes(**args.neo_sizes) == sizes
    assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (5, 64, 4)
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert {row.megatron for row in tensor_table(sizes)} == TorchDistDirectory(megatron).shapes.keys()
