"""A trained pre-buffer, taken out of one NEO and put in front of another Qwen3."""

import json
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import TOOLS

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import init_from_qwen3
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.checkpoint.pre_buffer import IMAGE_ROWS, extract_pre_buffer, open_pre_buffer
from neo_megatron.checkpoint.reader import open_either
from neo_megatron.checkpoint.to_hf import SHARD_BYTES

TOOL = TOOLS / "convert_checkpoint.py"
FRONT = ("vision_model.", "language_model.model.layers.0.", "language_model.model.layers.1.")
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def extracted(golden, tmp_path):
    """The golden NEO's pre-buffer, of two layers."""
    extract_pre_buffer(open_either(golden / "ckpt_untied"), tmp_path / "front", SHARD_BYTES)
    return tmp_path / "front"


def test_only_the_front_end_is_extracted(golden, extracted):
    neo, front = (load_file(path / "model.safetensors") for path in (golden / "ckpt_untied", extracted))
    assert front.keys() == {name for name in neo if name.startswith(FRONT)} | {IMAGE_ROWS}
    assert all(torch.equal(front[name], neo[name]) for name in front if name != IMAGE_ROWS)
    assert torch.equal(front[IMAGE_ROWS], neo[EMBEDDING][[897, 898]])  # <img> and </img>
    config = json.loads((extracted / "config.json").read_text())
    assert config["model_type"] == "neo_pre_buffer"
    sizes = read_sizes(golden / "ckpt_untied")
    assert open_pre_buffer(extracted).sizes == sizes.replace(post_llm_layers=0)


def test_extraction_from_megatrons_form_gives_the_same(golden, extracted, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    extract_pre_buffer(open_either(tmp_path / "megatron"), tmp_path / "again", SHARD_BYTES)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (extracted / name).read_bytes()


def test_ids_come_from_the_tokenizer_next_to_the_model(golden, tokenizer, tmp_path):
    shutil.copytree(golden / "ckpt_untied", tmp_path / "neo")
    added = {"<IMG_CONTEXT>": 896, "<img>": 897, "</img>": 905}
    (tmp_path / "neo" / "added_tokens.json").write_text(json.dumps(added))
    extract_pre_buffer(open_either(tmp_path / "neo"), tmp_path / "front", SHARD_BYTES)
    neo, front = (load_file(tmp_path / name / "model.safetensors") for name in ("neo", "front"))
    assert torch.equal(front[IMAGE_ROWS], neo[EMBEDDING][[897, 905]])


def without_pre_buffer(golden, tmp_path):
    shutil.copytree(golden / "ckpt_untied", tmp_path / "neo")
    config = json.loads((tmp_path / "neo" / "config.json").read_text())
    config["llm_config"]["extra_num_layers"] = 0
    (tmp_path / "neo" / "config.json").write_text(json.dumps(config))
    return tmp_path / "neo"


def test_models_without_a_pre_buffer_or_ids_are_refused(golden, variant, tmp_path):
    with pytest.raises(ValueError, match="has no pre-buffer: give a NEO that has one"):
        extract_pre_buffer(open_either(without_pre_buffer(golden, tmp_path)), tmp_path / "out", SHARD_BYTES)
    with pytest.raises(ValueError, match="nothing there tells the id of </img>"):
        extract_pre_buffer(open_either(variant(img_start_token_id=10)), tmp_path / "out", SHARD_BYTES)
    assert not (tmp_path / "out").exists()


def test_an_invalid_pre_buffer_is_refused(golden, extracted):
    with pytest.raises(ValueError, match="checkpoint of a NEO, not a pre-buffer.*extract-pre-buffer"):
        open_pre_buffer(golden / "ckpt_untied")
    config = json.loads((extracted / "config.json").read_text())
    config["llm_config"] |= {"extra_num_layers": 3, "num_hidden_layers": 3}
    (extracted / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks language_model.model.layers.2"):
        open_pre_buffer(extracted)


@pytest.mark.parametrize(("form", "experts"), [("separate", False), ("in-head", False), ("in-head", True)])
def test_an_extracted_pre_buffer_fits_back(golden, qwen3_moe, tokenizer, tmp_path, form, experts):
    """A NEO that was only started: the post-LLM is Qwen3's, so that the same weights come back, byte by byte."""
    qwen3 = qwen3_moe[0] if experts else golden / "qwen3_untied"
    init_from_qwen3(qwen3, tmp_path / "neo", 2, 32, tokenizer=tokenizer, seed=3, attention_form=form)
    extract_pre_buffer(open_either(tmp_path / "neo"), tmp_path / "front", SHARD_BYTES)
    attached = tmp_path / "attached"
    pre_buffer = open_pre_buffer(tmp_path / "front")
    init_from_qwen3(qwen3, attached, tokenizer=tokenizer, pre_buffer=pre_buffer, attention_form=form)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modeling_neo.py"):
        assert (attached / name).read_bytes() == (tmp_path / "neo" / name).read_bytes(), name


def test_in_front_of_another_qwen3(golden, extracted, tokenizer, tmp_path):
    """The front end is the trained one, the post-LLM the other Qwen3 with new keys that are zero."""
    pre_buffer = open_pre_buffer(extracted)
    init_from_qwen3(golden / "qwen3_untied", tmp_path / "neo", tokenizer=tokenizer, pre_buffer=pre_buffer)
    init_from_qwen3(golden / "qwen3_untied", tmp_path / "plain", 2, 32, tokenizer=tokenizer)
    neo, plain, trained = (
        load_file(path / "model.safetensors") for path in (tmp_path / "neo", tmp_path / "plain", golden / "ckpt_untied")
    )
    for name, tensor in neo.items():
        expected = (trained if name.startswith(FRONT) else plain)[name].clone()
        if name == EMBEDDING:
            expected[[897, 898]] = trained[name][[897, 898]]
        assert torch.equal(tensor, expected), name
    assert not torch.equal(neo[EMBEDDING][897], plain[EMBEDDING][897])
    sizes, trained_sizes = (read_sizes(path) for path in (tmp_path / "neo", golden / "ckpt_untied"))
    assert (sizes.min_pixels, sizes.max_pixels) == (trained_sizes.min_pixels, trained_sizes.max_pixels) == (4096, 65536)


def test_an_embedding_that_may_be_missing_is_drawn_around_the_trained_rows(golden, extracted, tokenizer, tmp_path):
    shutil.copytree(golden / "qwen3_untied", tmp_path / "qwen3")
    tensors = load_file(tmp_path / "qwen3" / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "qwen3" / "model.safetensors")
    options = {"tokenizer": tokenizer, "allow_missing": ["model.embed_tokens.weight"]}
    init_from_qwen3(tmp_path / "qwen3", tmp_path / "neo", pre_buffer=open_pre_buffer(extracted), **options)
    embedding = load_file(tmp_path / "neo" / "model.safetensors")[EMBEDDING]
    rows = load_file(extracted / "model.safetensors")[IMAGE_ROWS]
    assert torch.equal(embedding[[897, 898]], rows)
    assert 0.019 < embedding[:896].std() < 0.021 and embedding[:896].abs().max() < 0.2


def test_another_attention_form_is_refused(golden, extracted, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "attention_form": "in-head"}
    with pytest.raises(ValueError, match="attention_form"):
        init_from_qwen3(golden / "qwen3_untied", tmp_path / "neo", pre_buffer=open_pre_buffer(extracted), **options)


@pytest.mark.parametrize("key, value", [("rope_theta", 5e6), ("num_attention_heads", 8), ("hidden_size", 128)])
def test_another_shape_is_refused(golden, extracted, tokenizer, tmp_path, key, value):
    shutil.copytree(golden / "qwen3_untied", tmp_path / "qwen3")
    config = json.loads((tmp_path / "qwen3" / "config.json").read_text())
    (tmp_path / "qwen3" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"does not fit in front of .*: the pre-buffer has {key} "):
        pre_buffer = open_pre_buffer(extracted)
        init_from_qwen3(tmp_path / "qwen3", tmp_path / "out", tokenizer=tokenizer, pre_buffer=pre_buffer)
    assert not (tmp_path / "out").exists()


def test_the_commands(golden, tmp_path, monkeypatch, capsys):
    def convert(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    front, neo = tmp_path / "front", tmp_path / "neo"
    convert("extract-pre-buffer", "--neo", golden / "ckpt_untied", "--output", front)
    qwen3 = ("--qwen3", golden / "qwen3_untied", "--tokenizer", golden / "tokenizer")
    convert("attach-pre-buffer", "--pre-buffer", front, *qwen3, "--dtype", "bfloat16", "--output", neo)
    convert("info", neo)
    assert "5: pre-buffer 2, post-LLM 3" in capsys.readouterr().out
    tensors = load_file(neo / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with pytest.raises(SystemExit, match="convert_checkpoint: --pre-buffer .*not a pre-buffer"):
        convert("attach-pre-buffer", "--pre-buffer", neo, *qwen3, "--output", tmp_path / "out")
