"""A NEO Hugging Face directory -> a Megatron checkpoint for `--load` or `--pretrained-checkpoint`, on any layout."""

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_megatron.checkpoint.dcp_metadata import write_checksums
from neo_megatron.checkpoint.hf_directory import SafetensorsDirectory, output_directory
from neo_megatron.checkpoint.initialization import StartValues, missing_starts
from neo_megatron.checkpoint.names import Start, hf_tensors, tensor_table
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.checkpoint.streaming import StoredTensor, one_ahead
from neo_megatron.checkpoint.to_hf import check_tokenizer
from neo_megatron.checkpoint.torch_dist import TRACKER, write_torch_dist
from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes


def convert_hf_to_megatron(
    hf_directory: str | Path,
    output: str | Path,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
    tokenizer: Any | None = None,
) -> dict[str, Start]:
    """Writes ``output/release`` and the tracker file that names it.

    Args:
        dtype: of all tensors; by default each keeps its own, and every bit.
        allow_missing: patterns of Hugging Face names that may be missing; such a tensor starts as in a NEO made from a
            Qwen3, drawn from seed 0.
        tokenizer: the transformers tokenizer of the model, with NEO's tokens: for a ``hf_directory`` that does not tell
            the ids of the image tokens.

    Returns:
        The missing tensors, and what they start as.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the tokenizer is not the model's;
            ``output`` exists; a file is broken.
    """
    tokens = () if tokenizer is None else ("<img>", "<IMG_CONTEXT>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    neo = open_neo(hf_directory, allow_pickle, allow_missing, ids)
    if tokenizer is not None:
        check_tokenizer(tokenizer, neo.sizes)
    for sentence in neo.said:
        warnings.warn(f"{hf_directory}/config.json: {sentence}", stacklevel=2)
    sizes, source, missing = neo.sizes, neo.source, neo.missing
    rows = {row.megatron: row for row in tensor_table(sizes)}
    listed = missing_starts(missing, hf_tensors(sizes))
    starts = StartValues(seed=0, head_dim=sizes.head_dim, read=source.read)

    def fill(stored: StoredTensor, tensor: Tensor) -> None:
        row = rows[stored.name]
        for (name, part), view in zip(row.hf.items(), row.views(tensor), strict=True):
            if name in missing:
                starts.fill(view, part)
            else:
                source.read_into(name, view)

    stored = [
        StoredTensor(key, row.megatron_shape, dtype or _dtype(source, [name for name in row.hf if name not in missing]))
        for key, row in rows.items()
    ]
    with output_directory(output) as partial:
        release = partial / "release"
        release.mkdir()
        write_torch_dist(release, stored, one_ahead(stored, fill, "to Megatron"), _common_state(sizes))
        write_checksums(release)
        (partial / TRACKER).write_text("release")
    return listed


def _dtype(source: SafetensorsDirectory, names: list[str]) -> torch.dtype:
    """The one type of the parts of a Megatron tensor, or the checkpoint's where all of them are missing."""
    dtypes = {source.dtype(name) for name in names} or {source.main_dtype}
    if len(dtypes) > 1:
        raise CheckpointError(f"{source.directory}: {', '.join(names)} differ in dtype: choose one with --dtype")
    return dtypes.pop()


def _common_state(sizes: NeoSizes) -> dict[str, Any]:
    """The saved arguments: Megatron compares them with a run's, or takes them over with `--use-checkpoint-args`."""
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
