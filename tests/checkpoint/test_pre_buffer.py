"""A trained pre-buffer, taken out of one NEO and put in front of another Qwen3."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from neo_megatron.checkpoint.either_form import open_either
from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.pre_buffer import PICTURE_ROWS, extract_pre_buffer, open_pre_buffer
from neo_megatron.checkpoint.to_hf import SHARD_BYTES
from neo_megatron.model.config import NeoSizes

FRONT = ("vision_model.", "language_model.model.layers.0.", "language_model.model.layers.1.")
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def extracted(golden, tmp_path):
    """The golden NEO's pre-buffer, of two layers."""
    extract_pre_buffer(open_either(golden / "ckpt_untied"), tmp_path / "front", SHARD_BYTES)
    return tmp_path / "front"


def test_the_front_end_and_nothing_else_comes_out(golden, extracted):
    neo, front = (load_file(path / "model.safetensors") for path in (golden / "ckpt_untied", extracted))
    assert front.keys() == {name for name in neo if name.startswith(FRONT)} | {PICTURE_ROWS}
    assert all(torch.equal(front[name], neo[name]) for name in front if name != PICTURE_ROWS)
    assert torch.equal(front[PICTURE_ROWS], neo[EMBEDDING][[897, 898]])  # <img> and </img>
    config = json.loads((extracted / "config.json").read_text())
    assert config["model_type"] == "neo_pre_buffer"
    whole = NeoSizes.from_hf_directory(golden / "ckpt_untied")
    assert open_pre_buffer(extracted).sizes == whole.replace(post_llm_layers=0)


def test_the_same_comes_out_of_megatrons_form(golden, extracted, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "megatron")
    extract_pre_buffer(open_either(tmp_path / "megatron"), tmp_path / "again", SHARD_BYTES)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (extracted / name).read_bytes()


def test_a_tokenizer_beside_the_model_tells_the_ids(golden, tokenizer, tmp_path):
    shutil.copytree(golden / "ckpt_untied", tmp_path / "neo")
    added = {"<IMG_CONTEXT>": 896, "<img>": 897, "</img>": 905}
    (tmp_path / "neo" / "added_tokens.json").write_text(json.dumps(added))
    extract_pre_buffer(open_either(tmp_path / "neo"), tmp_path / "front", SHARD_BYTES)
    neo, front = (load_file(tmp_path / name / "model.safetensors") for name in ("neo", "front"))
    assert torch.equal(front[PICTURE_ROWS], neo[EMBEDDING][[897, 905]])


def without_pre_buffer(golden, tmp_path):
    shutil.copytree(golden / "ckpt_untied", tmp_path / "neo")
    config = json.loads((tmp_path / "neo" / "config.json").read_text())
    config["llm_config"]["extra_num_layers"] = 0
    (tmp_path / "neo" / "config.json").write_text(json.dumps(config))
    return tmp_path / "neo"


def test_what_cannot_come_out(golden, variant, tmp_path):
    with pytest.raises(ValueError, match="has no pre-buffer: give a NEO that has one"):
        extract_pre_buffer(open_either(without_pre_buffer(golden, tmp_path)), tmp_path / "out", SHARD_BYTES)
    with pytest.raises(ValueError, match="nothing there tells the id of </img>"):
        extract_pre_buffer(open_either(variant(img_start_token_id=10)), tmp_path / "out", SHARD_BYTES)
    assert not (tmp_path / "out").exists()


def test_what_is_no_pre_buffer(golden, extracted):
    with pytest.raises(ValueError, match="no pre-buffer .model_type 'neo_chat'.*extract-pre-buffer"):
        open_pre_buffer(golden / "ckpt_untied")
    config = json.loads((extracted / "config.json").read_text())
    config["llm_config"] |= {"extra_num_layers": 3, "num_hidden_layers": 3}
    (extracted / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks language_model.model.layers.2"):
        open_pre_buffer(extracted)
