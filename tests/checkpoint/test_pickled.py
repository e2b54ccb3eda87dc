"""Pickled weights: the same tensors, and nothing that runs."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from neo_megatron.checkpoint.pickled_directory import PickledDirectory, open_weights


class Exploit:
    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def tensors(golden):
    return load_file(golden / "qwen3_untied" / "model.safetensors")


def test_the_same_tensors_as_in_safetensors(golden, tensors, tmp_path):
    names = sorted(tensors)
    for number in (0, 1):
        torch.save({name: tensors[name] for name in names[number::2]}, tmp_path / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    pickled, safe = open_weights(tmp_path, allow_pickle=True), open_weights(golden / "qwen3_untied")
    assert pickled.shapes == safe.shapes
    for name in names:
        assert pickled.dtype(name) == safe.dtype(name) and torch.equal(pickled.read(name), safe.read(name))


def test_pickles_are_read_only_with_allow_pickle(golden, tensors, tmp_path):
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights are pickled, and a pickle can run anything: .*--allow-pickle"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((golden / "qwen3_untied" / "model.safetensors").read_bytes())
    assert not isinstance(open_weights(tmp_path, allow_pickle=True), PickledDirectory)  # never without need


@pytest.mark.parametrize("form", ["archive", "plain pickle"])
def test_pickles_cannot_run_anything(tmp_path, form):
    mark = tmp_path / "ran"
    contents = {"weight": Exploit(mark)}
    if form == "archive":
        torch.save(contents, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match="no plain state_dict"):
        open_weights(tmp_path, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    "contents, sentence",
    [
        ({}, "no tensors in its files"),
        ({"epoch": 3}, "'epoch' is not a tensor"),
        ([torch.zeros(2)], "holds a list"),
        ({"huge": torch.zeros(1).expand(1 << 40)}, "huge does not hold all of its values"),
        ({"sparse": torch.eye(3).to_sparse()}, "sparse does not hold all of its values"),
    ],
)
def test_only_a_state_dict_is_accepted(tmp_path, contents, sentence):
    torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=sentence):
        open_weights(tmp_path, allow_pickle=True)


def test_unsupported_dtypes_are_refused(tmp_path):
    torch.save({"quantised": torch.ones(3, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="quantised is stored as torch.int8: store it as one of"):
        open_weights(tmp_path, allow_pickle=True).dtype("quantised")


def test_a_broken_file_and_an_index_that_points_outside_are_refused(tensors, tmp_path):
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    saved = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(saved[:-100])
    with pytest.raises(ValueError, match="pytorch_model.bin: no plain state_dict"):
        open_weights(tmp_path, allow_pickle=True)
    wrong = saved.replace(b"\x80\x02}q\x00", b"\x80\x02h\x07N", 1)  # torch's unpickler answers with a KeyError
    assert wrong != saved
    (tmp_path / "pytorch_model.bin").write_bytes(wrong)
    with pytest.raises(ValueError, match="pytorch_model.bin: no plain state_dict"):
        open_weights(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    with pytest.raises(ValueError, match=r"'\.\./secret\.bin' is not a file of it"):
        open_weights(tmp_path, allow_pickle=True)


def test_one_file_wins_over_an_index_as_in_transformers(golden, tensors, tmp_path):
    """transformers leaves an old index next to a model that it saves as one file."""
    old = json.dumps({"weight_map": {"a": "gone"}})
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / file).write_text(old)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert PickledDirectory(tmp_path).shapes.keys() == tensors.keys()
    (tmp_path / "model.safetensors").write_bytes((golden / "qwen3_untied" / "model.safetensors").read_bytes())
    assert open_weights(tmp_path).shapes.keys() == tensors.keys()
