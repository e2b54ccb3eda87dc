"""Presets: named model sizes, and the hyperparameters of the training stages, which are the same for every size."""

from typing import Any

from neo_megatron.checkpoint.hub import config_directory
from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.published_sizes import PUBLISHED_SIZES
from neo_megatron.paths import Wanted, check_path

SIZES = {
    **PUBLISHED_SIZES,
    # Small enough to learn the quickstart on two CPU cores.
    "tiny": NeoSizes(
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=2,
        num_query_groups=2,
        head_dim=32,
        pre_buffer_layers=2,
        post_llm_layers=2,
        vocab_size=512,
        tie_word_embeddings=False,
        patch_embedding_size=64,
    ),
}

_ADAMW = dict(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0)
_COSINE = dict(lr_decay_style="cosine")

# Learning rates and schedules of the paper (arXiv 2510.14979, table 1).
STAGES: dict[int, dict[str, Any]] = {
    1: dict(lr=8e-4, min_lr=8e-5, lr_warmup_fraction=0.01, **_COSINE, **_ADAMW),
    2: dict(lr=4e-5, min_lr=8e-6, lr_warmup_fraction=0.03, **_COSINE, **_ADAMW),
    3: dict(lr=5e-5, min_lr=5e-6, lr_warmup_fraction=0.03, **_COSINE, **_ADAMW),
}


def sizes(name_or_directory: str) -> NeoSizes:
    """The sizes of a preset, or those in the `config.json` of a NEO in Hugging Face form.

    Args:
        name_or_directory: a preset, a directory or a hub id.

    Raises:
        ConfigError: it is none of these, or its sizes are not those of a NEO.
    """
    if name_or_directory in SIZES:
        return SIZES[name_or_directory]
    try:
        directory = config_directory(name_or_directory)
        if directory.exists():
            check_path(directory, Wanted.SIZES)
        if (directory / "config.json").is_file():
            from neo_megatron.checkpoint.neo_directory import read_sizes  # here: it brings torch

            return read_sizes(directory)
    except ValueError as error:
        raise ConfigError(f"--neo-model {name_or_directory}: {error}") from error
    raise ConfigError(
        f"--neo-model {name_or_directory}: neither a preset ({', '.join(SIZES)}) nor a directory with a config.json "
        "nor a hub id"
    )
