"""Every form in which a NEO's `config.json` was published is read as the same model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

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


def test_optional_keys(published):
    """Layer types say nothing; the ids of the image tokens are Qwen3's; the pre-buffer's size is unknown."""
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


def test_another_model_is_not_taken_for_a_mislabelled_neo():
    with pytest.raises(ValueError, match="model_type 'internvl_chat' without llm_hidden_size"):
        NEOChatConfig(model_type="internvl_chat", vision_config={"hidden_size": 1024})


def test_another_name_of_the_image_token(published, tmp_path):
    """TRL and others ask for `image_token_id`; it is written under the published name alone."""
    config = NEOChatConfig(**published)
    assert config.image_token_id == config.img_context_token_id == 896
    del published["img_context_token_id"]
    renamed = NEOChatConfig(**published, image_token_id=5)
    assert renamed.img_context_token_id == 5
    renamed.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["img_context_token_id"] == 5 and "image_token_id" not in saved
    assert NEOChatConfig.from_pretrained(tmp_path).image_token_id == 5


UNIFY = Path(__file__).parents[1] / "golden" / "u1" / "dense" / "config.json"


def test_a_neo_unify_is_named():
    with pytest.raises(ValueError, match=r"has fm_head_dim: this is a NEO-unify \(SenseNova-U1\) checkpoint"):
        NEOChatConfig(**json.loads(UNIFY.read_text()))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"noise_scale": 1.0}, "has noise_scale: this is a NEO-unify"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config \(gptq\)"),
        ({"template": "internvl2_5"}, "the template 'internvl2_5', and NEO knows 'neo1_0'"),
    ],
)
def test_unsupported_checkpoints_are_named(golden, published, tmp_path, change, sentence):
    """In `from_pretrained`, before any weight is read."""
    (tmp_path / "config.json").write_text(json.dumps({**published, **change}))
    with pytest.raises(ValueError, match=sentence):
        NEOChatModel.from_pretrained(tmp_path)


def test_sliding_windows_are_unused_or_refused(published):
    """Qwen configurations name one that is not used; a cache made by them must not have it."""
    published["llm_config"] |= {"sliding_window": 8, "use_sliding_window": False}
    config = NEOChatConfig(**published)
    assert not any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config.llm_config).layers)
    published["llm_config"]["use_sliding_window"] = True
    with pytest.raises(ValueError, match="NEO attends to all tokens"):
        NEOChatConfig(**published)
