"""Sizes: to and from published configs, and refusals that say what to change."""

import json

import pytest

from neo_megatron import presets
from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.transformer_config import NeoConfig


def test_reads_the_published_config(golden):
    sizes = read_sizes(golden / "ckpt_untied")
    assert (sizes.hidden_size, sizes.ffn_hidden_size, sizes.head_dim) == (64, 96, 32)
    assert (sizes.num_attention_heads, sizes.num_query_groups) == (4, 2)
    assert (sizes.pre_buffer_layers, sizes.post_llm_layers) == (2, 3)
    assert (sizes.rope_theta, sizes.rope_theta_hw, sizes.rope_theta_patch) == (1e6, 1e4, 1e4)
    assert (sizes.image_start_token_id, sizes.image_context_token_id) == (897, 896)


def test_numbers_wrapped_in_lists_are_read_too(golden):
    config = json.loads((golden / "ckpt_untied" / "config.json").read_text())
    plain = NeoSizes.from_hf(config)
    config["vision_config"]["llm_hidden_size"] = [64]
    config["vision_config"]["downsample_ratio"] = [0.5]
    config["llm_config"]["rope_theta_hw"] = [10000.0]
    assert NeoSizes.from_hf(config) == plain


@pytest.mark.parametrize("name", presets.SIZES)
def test_presets_survive_the_round_trip(name):
    sizes = sizes_of(name)
    assert NeoSizes.from_hf(json.loads(json.dumps(sizes.to_hf()))) == sizes


def test_presets_are_the_published_models():
    small, large = sizes_of("neo-2b"), sizes_of("neo-9b")
    assert (small.num_layers, large.num_layers) == (40, 42)
    assert small.tie_word_embeddings and not large.tie_word_embeddings


def test_a_foreign_config_is_refused():
    with pytest.raises(ValueError, match="not a NEO config.json.*vision_config"):
        NeoSizes.from_hf({"llm_config": {}, "model_type": "qwen3"})


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="--neo-model neo-3b.*neo-2b"):
        sizes_of("neo-3b")


def test_a_layout_that_cannot_work_is_refused(sizes):
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 4 does not divide the 2 query heads"):
        NeoConfig.from_sizes(sizes, tensor_model_parallel_size=4)
