"""Models of one Megatron process without a GPU, built in place."""

import pytest

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()


@pytest.fixture
def sizes():
    """A model of two pre-buffer and two post-LLM layers that builds in no time."""
    from neo_megatron.presets import SIZES

    return SIZES["tiny"].replace(hidden_size=32, ffn_hidden_size=48, head_dim=16, vocab_size=64)


@pytest.fixture
def text_inputs():
    """Inputs of the model: one document of text without images, on chosen tokens and positions."""
    import torch

    def inputs(tokens, positions=0):
        length = len(tokens)
        return {
            "tokens": torch.tensor([tokens]),
            "positions_thw": torch.full((1, length, 3), positions, dtype=torch.int32),
            "document": torch.zeros(1, length, dtype=torch.int32),
            "image": -torch.ones(1, length, dtype=torch.int32),
            "patches": torch.zeros(0, 4, 768, dtype=torch.uint8),
            "image_token_index": torch.zeros(0, dtype=torch.int64),
            "image_token_position": torch.zeros(0, 2, dtype=torch.int32),
        }

    return inputs


@pytest.fixture
def build(megatron, sizes):
    """Builds a `NeoModel` on this one process; keywords change sizes."""
    from neo_megatron.model.neo_model import NeoModel
    from neo_megatron.model.transformer_config import NeoConfig

    def build_model(**changes):
        config = NeoConfig.from_sizes(
            sizes.replace(**changes), transformer_impl="local", gradient_accumulation_fusion=False
        )
        return NeoModel(config)

    return build_model
