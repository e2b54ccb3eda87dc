"""Every form in which a NEO's `config.json` was published is read as the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from neo_megatron.hf import configuration_neo
from neo_megatron.hf.configuration_neo import NEOChatConfig, NEOLLMConfig
from neo_megatron.hf.modeling_neo import NEOChatModel


@pytest.fixture
def published(golden):
    return json.loads((golden / "ckpt_untied" / "config.json").read_text())


def test_plain_scalars_and_lists_of_one(published):
    plain = NEOChatConfig(**published).to_dict()
    published["vision_config"] |= {"llm_hidden_size": [64], "downsample_ratio": [0.5]}
    published["llm_config"] |= {"rope_theta_hw": [10000.0], "num_hidden_layers": [5], "rope_theta": [1e6]}
    published |= {"downsample_ratio": [0.5], "img_start_token_id": [897]}
    assert NEOChatConfig(**published).to_dict() == plain


def test_what_may_be_absent(published):
    """Layer types say nothing; the ids of the picture tokens are Qwen3's; the pre-buffer's size is unknown."""
    plain = NEOChatConfig(**published).to_dict()
    published["llm_config"]["layer_types"] = ["full_attention"] * 5
    assert NEOChatConfig(**published).to_dict() == plain
    for key in ("img_start_token_id", "img_context_token_id"):
        published.pop(key, None)
    published["llm_config"].pop("extra_num_layers")
    config = NEOChatConfig(**published)
    assert (config.img_start_token_id, config.img_context_token_id) == (151670, 151669)
    assert config.llm_config.extra_num_layers is None
    assert config.llm_config.num_hidden_layers == 5


def test_tied_embeddings_are_told_at_either_place(published):
    for place, other in ((published, published["llm_config"]), (published["llm_config"], published)):
        place["tie_word_embeddings"] = True
        other.pop("tie_word_embeddings", None)
        config = NEOChatConfig(**published)
        assert config.tie_word_embeddings and config.llm_config.tie_word_embeddings


def test_the_base_of_a_rotation_in_a_dictionary():
    """As transformers 5 writes Qwen3's."""
    assert NEOLLMConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e6}).rope_theta == 5e6


@torch.no_grad()
def test_a_mislabelled_checkpoint(golden, published, tmp_path, document, model, monkeypatch):
    """A NEO that calls itself an InternVL, with code that is not there: loaded, said, and saved under its name."""
    code = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    published |= {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(published))
    tensors = load_file(golden / "ckpt_untied" / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    monkeypatch.setattr(configuration_neo.logger, "warning", said.append)
    found = NEOChatModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert "calls this NEO 'internvl_chat': read as 'neo_chat'" in said[0]
    torch.testing.assert_close(found(**document).logits, model(**document).logits)
    found.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("neo_chat", ["NEOChatModel"])
    assert "auto_map" not in saved


def test_another_model_is_no_mislabelled_neo():
    with pytest.raises(ValueError, match="model_type 'internvl_chat' without llm_hidden_size"):
        NEOChatConfig(model_type="internvl_chat", vision_config={"hidden_size": 1024})
