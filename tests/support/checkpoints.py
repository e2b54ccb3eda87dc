"""Checkpoints to convert: the golden one, and variants of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture
def variant(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """A changed copy of a golden Hugging Face directory.

    ``change`` edits the tensors in place; keywords replace keys of the configuration.
    """

    def make(
        change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
        source: str = "ckpt_untied",
        **keys: Any,
    ) -> Path:
        directory = tmp_path / "variant"
        directory.mkdir()
        tensors = load_file(golden / source / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        config = json.loads((golden / source / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **keys}))
        return directory

    return make


@pytest.fixture
def tied(variant: Callable[..., Path]) -> Path:
    """The golden model with its embedding as its head."""
    return variant(lambda tensors: tensors.pop(HEAD), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A random Qwen3-MoE, as transformers saves it."""
    import transformers

    directory = tmp_path_factory.mktemp("qwen3-moe")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 48, "norm_topk_prob": True, "rope_theta": 1e6, "tie_word_embeddings": False},
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
    model.save_pretrained(directory)
    return directory, model
