"""A NEO Hugging Face directory -> a Megatron checkpoint for `--load` or `--pretrained-checkpoint`, on any layout."""

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from neo_megatron.checkpoint.hf_directory import whole_directory
from neo_megatron.checkpoint.integrity import write_checksums
from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.checkpoint.torch_dist import TRACKER, write_torch_dist
from neo_megatron.model.config import NeoSizes


def convert_hf_to_megatron(hf_directory: str | Path, output: str | Path, allow_pickle: bool = False) -> None:
    """Writes ``output/release`` and the tracker file that names it; values and types stay as they are.

    Holds the parts of one Megatron tensor in memory at a time.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; ``output`` exists; a file is broken.
    """
    neo = open_neo(hf_directory, allow_pickle)
    for sentence in neo.said:
        warnings.warn(f"{hf_directory}/config.json: {sentence}", stacklevel=2)
    sizes, source = neo.sizes, neo.source
    rows = {row.megatron: row for row in tensor_table(sizes)}

    def value_of(key: str) -> Tensor:
        return rows[key].merge([source.read(name) for name in rows[key].hf])

    tensors = {}
    for key, row in rows.items():
        kinds = {source.dtype(name) for name in row.hf}
        if len(kinds) > 1:
            raise ValueError(f"{hf_directory}: {', '.join(row.hf)} differ in dtype: store them in one")
        tensors[key] = (row.megatron_shape, kinds.pop())
    with whole_directory(output) as partial:
        release = partial / "release"
        release.mkdir()
        write_torch_dist(release, tensors, value_of, _common_state(sizes))
        write_checksums(release)
        (partial / TRACKER).write_text("release")


def _common_state(sizes: NeoSizes) -> dict[str, Any]:
    """What `megatron.training` compares with the run's own arguments, or takes over with `--use-checkpoint-args`."""
    args = argparse.Namespace(
        neo_sizes=dataclasses.asdict(sizes),
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        group_query_attention=True,
        num_query_groups=sizes.num_query_groups,
        kv_channels=sizes.head_dim,
        max_position_embeddings=sizes.max_positions,
        padded_vocab_size=sizes.vocab_size,
        untie_embeddings_and_output_weights=not sizes.tie_word_embeddings,
        add_position_embedding=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        normalization="RMSNorm",
        norm_epsilon=sizes.norm_epsilon,
        swiglu=True,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0}
