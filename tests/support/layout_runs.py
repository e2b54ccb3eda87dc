"""Runs of one random model on several layouts, which must train alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import hf_shapes, tensor_table
from neo_megatron.model.config import NeoSizes
from neo_megatron.presets import SIZES
from support.pretrain_jobs import Job

# Heads for TP2 x CP2 and CP4 by all-to-all, layers for PP4; the special tokens of the golden tokenizer.
SMALL = SIZES["tiny"].replace(
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    vocab_size=1024,
    patch_embedding_size=32,
    image_start_token_id=897,
    image_context_token_id=896,
)
# The other variants of the family.
IN_HEAD = SMALL.replace(attention_form="in-head")
EXPERTS = IN_HEAD.replace(num_experts=8, experts_per_token=2, expert_ffn_hidden_size=32)


def write_random_model(directory: Path, sizes: NeoSizes) -> Path:
    """A random model in both forms; weights wide enough that every gradient counts."""
    (directory / "config.json").write_text(json.dumps(sizes.to_hf()))
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.05 + ("norm" in name) for name, shape in hf_shapes(sizes).items()
    }
    save_file(tensors, directory / "model.safetensors")
    convert_hf_to_megatron(directory, directory / "megatron")
    return directory


def layout_job(directory: Path, model: Path, packs: Path, flags: str, iterations: int = 3) -> Job:
    """A short run from a model of `write_random_model`, four packs a step, whose last gradients are kept."""
    command = [
        *("--neo-model", model, "--pretrained-checkpoint", model / "megatron", "--train-data-path", packs),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", str(iterations)),
        *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "0", "--num-workers", "0"),
        *("--log-interval", "1", *flags.split()),
    ]
    return Job(directory, command, gradients=True)


def assert_same(sizes: NeoSizes, actual: Job, expected: Job, loss: float, gradient: float) -> None:
    """Losses of every step within ``loss``, and the last gradients within ``gradient`` relative; 0 where frozen."""
    losses, wanted = actual.scalars("lm loss"), expected.scalars("lm loss")
    assert losses.keys() == wanted.keys() and wanted
    for step, values in wanted.items():
        assert losses[step] == pytest.approx(values, abs=loss, rel=0), step
    gradients, reference = actual.read_gradients(), expected.read_gradients()
    assert gradients.keys() == reference.keys() == {row.megatron for row in tensor_table(sizes)}
    for name, value in reference.items():
        error, size = (gradients[name] - value).norm(), value.norm()
        assert error <= gradient * size, f"{name}: error {error:.2e} of {size:.2e}"  # nor is it not a number
