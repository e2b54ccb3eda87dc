"""The command line: three commands in a row, and errors as one sentence."""

import json
import resource
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.paths import TOOLS

from neo_megatron.checkpoint.named_sizes import sizes_of

TOOL = TOOLS / "convert_checkpoint.py"


@pytest.fixture
def convert(monkeypatch):
    """Runs the tool in this process: importing Megatron takes seconds."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    return run


def test_from_qwen3_to_megatron_and_back(convert, golden, tmp_path):
    neo, megatron, back = (tmp_path / name for name in ("neo", "megatron", "back"))
    tokenizer = ("--tokenizer", golden / "tokenizer")
    start = ("--pre-buffer-layers", 1, "--key-hw-init", "zero-norm")
    convert("qwen3-to-neo", "--qwen3", golden / "qwen3_untied", "--output", neo, *start, *tokenizer)
    convert("hf-to-megatron", "--hf", neo, "--output", megatron)
    convert("megatron-to-hf", "--megatron", megatron, "--output", back, "--max-shard-size", "4MB", *tokenizer)
    shards = sorted(back.glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 4_010_000 for shard in shards)
    before = load_file(neo / "model.safetensors")
    after = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert not before["language_model.model.layers.1.self_attn.k_norm_h.weight"].any()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json"):
        assert json.loads((neo / name).read_text()) == json.loads((back / name).read_text()), name


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_neo_unify_that_does_not_tell_its_image_tokens_is_converted_with_a_tokenizer(convert, golden, tmp_path, kind):
    """As U1 may be published: no ids in config.json, a tokenizer without NEO's tokens. Both branches come back."""
    unify, megatron, back, out = (tmp_path / name for name in ("unify", "megatron", "back", "out"))
    shutil.copytree(golden / "u1" / kind, unify, copy_function=shutil.copyfile)
    (unify / "added_tokens.json").unlink()
    shutil.copyfile(golden / "tokenizer" / "tokenizer.json", unify / "tokenizer.json")
    with pytest.raises(SystemExit, match="no tokenizer there knows <img>: .* hf-to-megatron --tokenizer"):
        convert("hf-to-megatron", "--hf", unify, "--output", out)
    tokenizer = ("--tokenizer", golden / "tokenizer")
    convert("hf-to-megatron", "--hf", unify, "--output", megatron, *tokenizer)
    sizes = sizes_of(str(megatron))  # which a run takes as --neo-model
    assert sizes.image_token_ids == {"<img>": 897, "<IMG_CONTEXT>": 896} and sizes.num_layers == 5
    convert("megatron-to-hf", "--megatron", megatron, "--output", back, *tokenizer, "--generation-branch", unify)
    before, after = (
        {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for directory in (unify, back)
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # Where the directory tells the ids, a tokenizer that has others is another model's.
    (unify / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 5, "<img>": 6, "</img>": 7}))
    with pytest.raises(SystemExit, match="<img> has the id 897, the model was trained with 6"):
        convert("hf-to-megatron", "--hf", unify, "--output", out, *tokenizer)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("hf-to-megatron", "--hf", "nowhere"), "convert_checkpoint: --hf nowhere does not exist"),
        (
            ("megatron-to-hf", "--megatron", "nowhere", "--tokenizer", "here"),
            "convert_checkpoint: --megatron nowhere does not exist",
        ),
    ],
)
def test_an_error_is_one_sentence(convert, tmp_path, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments, "--output", tmp_path / "out")
    assert str(stopped.value).startswith(sentence) and "\n" not in str(stopped.value)


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_is_one_sentence_and_leaves_no_checkpoint(convert, golden, tmp_path, command):
    """A limit on the size of files stands in for the disk."""
    convert("hf-to-megatron", "--hf", golden / "ckpt_untied", "--output", tmp_path / "megatron")
    arguments = {
        "hf-to-megatron": ("--hf", golden / "ckpt_untied"),
        "megatron-to-hf": ("--megatron", tmp_path / "megatron", "--tokenizer", golden / "tokenizer"),
    }
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            convert(command, *arguments[command], "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert str(stopped.value) == (
        f"convert_checkpoint: {tmp_path / 'out.partial'} cannot be written (File too large): "
        "free space, then run the same command again"
    )
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_listed_and_types_changed(convert, variant, golden, tmp_path, capsys):
    gone = "language_model.model.layers.2.self_attn.k_proj_hw.weight"
    source = variant(lambda tensors: tensors.pop(gone))
    options = ("--allow-missing", "*.q_proj_hw.weight", "--allow-missing", "*.k_proj_hw.weight", "--dtype", "bfloat16")
    convert("hf-to-megatron", "--hf", source, "--output", tmp_path / "megatron", *options)
    assert f"missing: {gone}, all 0\n" in capsys.readouterr().out
    tokenizer = ("--tokenizer", golden / "tokenizer")
    convert("megatron-to-hf", "--megatron", tmp_path / "megatron", "--output", tmp_path / "hf", *tokenizer)
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("size", ["5", "GB", "0MB", "5GBs"])
def test_a_size_that_is_none_is_refused(convert, golden, capsys, size):
    neo = ("--neo", golden / "ckpt_untied")
    with pytest.raises(SystemExit):
        convert("extract-pre-buffer", *neo, "--output", "o", "--max-shard-size", size)
    assert f"'{size}' is not a size: write it as 5GB or 500MB" in capsys.readouterr().err
