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
