"""One Megatron process without a GPU, for tests that build models in place."""

import os

import pytest

from neo_megatron import cpu_platform

cpu_platform.install()


@pytest.fixture(scope="session")
def megatron():
    """A process group of one, with Megatron's groups and random states."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def sizes():
    """A model of two pre-buffer and two post-LLM layers that builds in no time."""
    from neo_megatron.presets import SIZES

    return SIZES["tiny"].replace(hidden_size=32, ffn_hidden_size=48, head_dim=16, vocab_size=64)


@pytest.fixture
def text_inputs():
    """Inputs of the model: one document of text without pictures, on chosen tokens and positions."""
    import torch

    def inputs(tokens, positions=0):
        length = len(tokens)
        return {
            "tokens": torch.tensor([tokens]),
            "positions_thw": torch.full((1, length, 3), positions, dtype=torch.int32),
            "document": torch.zeros(1, length, dtype=torch.int32),
            "image": -torch.ones(1, length, dtype=torch.int32),
            "patches": torch.zeros(0, 4, 768, dtype=torch.uint8),
            "cell_index": torch.zeros(0, dtype=torch.int64),
            "cell_position": torch.zeros(0, 2, dtype=torch.int32),
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
