"""`neo-megatron convert info`: its figures, and that its hash depends on the weights alone."""

import hashlib
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.golden_models import MODELS
from support.paths import TOOLS

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.info import contents, weights_hash
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory, write_torch_dist
from neo_megatron.errors import CheckpointError

TOOL = TOOLS / "convert_checkpoint.py"


@pytest.fixture
def converted(golden, tmp_path) -> Path:
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.mark.parametrize("name", MODELS)
def test_one_hash_for_either_form_and_any_sharding(tokenizer, tmp_path, name):
    """Without the generation branch, if there is one."""
    published = MODELS[name].checkpoint
    convert_hf_to_megatron(published, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer, shard_bytes=300_000)
    hashes = {weights_hash(contents(path)) for path in (published, tmp_path / "megatron", tmp_path / "hf")}
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_the_hash_is_what_its_description_says(golden):
    lines = []
    for name, tensor in sorted(load_file(golden / "ckpt_untied" / "model.safetensors").items()):
        values = hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()
        lines.append(f"{name} float32 {list(tensor.shape)} {values}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert weights_hash(contents(golden / "ckpt_untied")) == expected


def test_any_other_value_shape_or_type_has_another_hash(variant, golden):
    def nudge(tensors):
        tensors["language_model.model.norm.weight"][3] += 1e-6

    assert weights_hash(contents(variant(nudge))) != weights_hash(contents(golden / "ckpt_untied"))
    one, other = (contents(golden / "ckpt_untied") for _ in range(2))
    same_bytes = [tensor.__class__(tensor.name, tensor.shape[::-1], tensor.dtype) for tensor in other.stored]
    other.stored[:] = same_bytes
    assert weights_hash(one) != weights_hash(other)


def test_a_tied_head_that_repeats_the_embedding_changes_nothing(variant, tied):
    lean = weights_hash(contents(tied))
    (tied / "model.safetensors").unlink()
    tied.rename(tied.with_name("lean"))

    def repeat(tensors):
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()

    assert weights_hash(contents(variant(repeat, tie_word_embeddings=True))) == lean


def test_contents_of_a_checkpoint(golden):
    lines = contents(golden / "ckpt_untied").lines
    assert lines["checkpoint"].endswith("a NEO in Hugging Face form")
    assert lines["layers"] == "5: pre-buffer 2, post-LLM 3"
    assert lines["sizes"].startswith("hidden 64, feed-forward 96, 4 query and 2 key-value heads of 32")
    assert lines["tensors"] == "92, 441,760 float32; 1.8 MB"
    assert lines["  pre-buffer"].startswith("111,104 float32")
    assert lines["tokens"] == "1024 rows, head apart; <img> 897, <IMG_CONTEXT> 896"
    assert contents(golden / "qwen3_untied").lines["checkpoint"].endswith("of the type 'qwen3'")


def test_a_mislabelled_checkpoint_is_shown_as_what_it_is(variant):
    lines = contents(variant(model_type="internvl_chat")).lines
    assert lines["checkpoint"].endswith("a NEO in Hugging Face form")
    assert lines["corrected 1"].startswith("model_type is 'internvl_chat'")


def saved_run(directory: Path, start: TorchDistDirectory, tensors: dict[str, torch.Tensor], **arguments) -> Path:
    """A checkpoint of a run whose arguments are those of its start, but for some."""
    state = start.common_state()
    state["args"] = Namespace(**vars(state["args"]) | arguments)
    directory.mkdir()
    stored = [StoredTensor(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    write_torch_dist(directory, stored, tensors.values(), {**state, "iteration": 8})
    return directory


def test_progress_and_optimizer_state_of_a_run_are_shown(converted, tmp_path):
    saved = TorchDistDirectory(converted)
    tensors = {key: saved.read(key) for key in saved.shapes} | {"optimizer.state.exp_avg.x": torch.ones(250_000)}
    run = saved_run(tmp_path / "run", saved, tensors, consumed_train_samples=64, seq_length=192)
    lines = contents(run).lines
    assert lines["training"] == "iteration 8, 64 packs of 192 tokens: 12,288 tokens"
    assert lines["optimizer state"] == "1.0 MB" and "  patch embedding" in lines
    assert weights_hash(contents(run)) == weights_hash(contents(converted))


def test_packs_of_several_lengths_are_counted_apart(converted, tmp_path):
    saved = TorchDistDirectory(converted)
    tensors = {key: saved.read(key) for key in saved.shapes}
    progress = {"consumed_train_samples": 64, "seq_length": 384}
    lengths = [[0, 192], [40, 384], [80, 96]]
    run = saved_run(tmp_path / "run", saved, tensors, **progress, pack_lengths=lengths)
    assert contents(run).lines["training"] == (
        "iteration 8, 40 packs of 192 tokens and 24 packs of 384 tokens: 16,896 tokens"
    )
    for number, wrong in enumerate((7, [7], [[0]], [[0, "x"]])):
        damaged = saved_run(tmp_path / f"damaged-{number}", saved, tensors, **progress, pack_lengths=wrong)
        with pytest.raises(CheckpointError, match="whose arguments have packs of .* tokens: copy it again"):
            contents(damaged)


def test_the_command(golden, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "info", str(golden / "ckpt_untied")])
    runpy.run_path(str(TOOL), run_name="__main__")
    shown = capsys.readouterr().out
    assert "pre-buffer 2" in shown and shown.splitlines()[-1].split()[-1] == weights_hash(
        contents(golden / "ckpt_untied")
    )
    monkeypatch.setattr(sys, "argv", [str(TOOL), "info", "nowhere"])
    with pytest.raises(SystemExit, match="convert_checkpoint: nowhere does not exist"):
        runpy.run_path(str(TOOL), run_name="__main__")
