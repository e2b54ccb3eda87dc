"""Makes a NEO from a Qwen3 or a Qwen3-MoE, both Hugging Face directories, to start stage 1 from.

Qwen3's layer i becomes layer ``pre_buffer_layers + i``, unchanged, and computes on text what it computed before: its
new keys for rows and columns are zero. The pre-buffer and the patch embedding are drawn from a seed.

That is the form `separate`. In the form `in-head` (see `model/attention_forms.py`) the channels of Qwen3's query and
key heads are shared out, as `names.qwen3_channels` has it: nothing is new, but the layer computes something else.

Zero keys can be made in two ways (`KeyHwInit`):
    published  the projection W_k_hw is zero. RMSNorm of zero is zero, but its derivative there is 1/sqrt(eps) = 1,000.
    zero-norm  the weights of the norms after W_k_hw are zero; W_k_hw itself is made from W_k as W_q_hw is from W_q.
               The gradient then reaches the norms at ordinary size. docs/key_hw_init.md compares both.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.hf_directory import SafetensorsDirectory, output_directory, write_safetensors
from neo_megatron.checkpoint.initialization import StartValues, missing_starts
from neo_megatron.checkpoint.names import (
    DECODER,
    LM_HEAD,
    WORD_EMBEDDING,
    HfTensor,
    Start,
    check_shapes,
    hf_tensors,
    qwen3_name,
)
from neo_megatron.checkpoint.pickled_directory import open_weights
from neo_megatron.checkpoint.pre_buffer import PreBuffer, TrainedPart
from neo_megatron.checkpoint.streaming import StoredTensor, copy_exactly, one_ahead
from neo_megatron.checkpoint.to_hf import SHARD_BYTES, check_tokenizer, write_companions
from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes, beyond_qwen3, experts_from_qwen3
from neo_megatron.paths import Wanted, check_path

VOCABULARY_MULTIPLE = 128

KeyHwInit = Literal["published", "zero-norm"]


def init_from_qwen3(
    qwen3_directory: str | Path,
    output: str | Path,
    pre_buffer_layers: int = 0,
    patch_embedding_size: int = 1024,
    tokenizer: Any | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    pre_buffer: PreBuffer | None = None,
    key_hw_init: KeyHwInit = "published",
    attention_form: str = "separate",
    shard_bytes: int = SHARD_BYTES,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
) -> dict[str, Start]:
    """Writes ``output``.

    Args:
        tokenizer: a transformers tokenizer with NEO's tokens; saved with the model. Without one, NEO's tokens are
            taken to have the ids they have on Qwen3.
        vocab_size: rows of the embedding and the head; by default Qwen3's, and more only if the tokenizer needs them.
            Further rows are zero, surplus rows are cut.
        pre_buffer: a trained one, instead of one that is drawn; it decides the number of layers and the width of the
            patch embedding.
        key_hw_init: what makes the post-LLM's keys for rows and columns zero, see above.
        attention_form: a key of `attention_forms.FORMS`.
        shard_bytes: largest weight file.
        allow_pickle: take pickled weights where there are no safetensors, see `pickled_directory.py`.
        dtype: of all tensors; by default those of Qwen3 and of a trained pre-buffer keep their own, and what is new
            gets that of Qwen3's largest.
        allow_missing: patterns of Qwen3's names that may be missing; such a tensor starts as the pre-buffer's does.

    Returns:
        The missing tensors by their names in the new NEO, and what they start as.

    Raises:
        CheckpointError: not a complete Qwen3; sizes NEO does not have; a tokenizer larger than ``vocab_size``; a
            pre-buffer of another shape; zero norms for keys that the form does not have.
    """
    check_path(qwen3_directory, Wanted.QWEN3)
    config = read_json(Path(qwen3_directory) / "config.json")
    source = open_weights(qwen3_directory, allow_pickle)
    if pre_buffer is not None:
        pre_buffer_layers = pre_buffer.sizes.pre_buffer_layers
        patch_embedding_size = pre_buffer.sizes.patch_embedding_size
    sizes = _neo_sizes(config, qwen3_directory, pre_buffer_layers, patch_embedding_size, tokenizer, vocab_size)
    sizes = sizes.replace(attention_form=attention_form)
    if key_hw_init != "published" and sizes.form.products == 1:
        raise CheckpointError(
            f"--key-hw-init {key_hw_init}: the attention form {attention_form} has no keys of their own for rows and "
            "columns: leave it out"
        )
    if tokenizer is None:
        warnings.warn(
            f"no tokenizer given: <IMG_CONTEXT> and <img> get Qwen3's ids {sizes.image_context_token_id} and "
            f"{sizes.image_start_token_id}; give --tokenizer for any other tokenizer",
            stacklevel=2,
        )
    else:
        check_tokenizer(tokenizer, sizes)
    trained: dict[str, TrainedPart] = {}
    if pre_buffer is not None:
        sizes = pre_buffer.sizes_in_front_of(sizes, qwen3_directory)
        trained = pre_buffer.parts(sizes, tokenizer)
    missing = _check_tensors(source, sizes, config["vocab_size"], allow_missing)
    tensors = _tensors(sizes, key_hw_init)
    started = [name for name, tensor in tensors.items() if tensor.qwen3 not in source.shapes and name not in trained]
    listed = {name: start for name, start in missing_starts(started, tensors).items() if tensors[name].qwen3 in missing}
    starts = StartValues(seed, sizes.head_dim, read=lambda name: source.read(tensors[name].qwen3))

    def fill(stored: StoredTensor, values: Tensor) -> None:
        tensor = tensors[stored.name]
        if tensor.qwen3 not in source.shapes and tensor.start.kind == "copy":
            tensor = tensors[tensor.start.of]  # a missing head is the embedding
        if tensor.qwen3 in source.shapes:
            if tensor.channels:
                heads = source.read(tensor.qwen3).unflatten(0, (-1, sizes.head_dim))
                copy_exactly(values, heads[:, tensor.channels].reshape(values.shape))
                return
            rows = min(len(values), source.shapes[tensor.qwen3][0])
            source.read_into(tensor.qwen3, values[:rows])
            values[rows:] = 0
        elif stored.name not in trained or stored.name == WORD_EMBEDDING:  # of that, only rows are trained
            starts.fill(values, tensor)
        if stored.name in trained:
            trained[stored.name](values)

    def dtype_of(name: str) -> torch.dtype:
        if dtype is None and tensors[name].qwen3 in source.shapes:
            return source.dtype(tensors[name].qwen3)
        if dtype is None and pre_buffer is not None and name in pre_buffer.source.shapes:
            return pre_buffer.source.dtype(name)
        return dtype or source.main_dtype

    stored = [StoredTensor(name, tensor.shape, dtype_of(name)) for name, tensor in tensors.items()]
    with output_directory(output) as directory:
        write_safetensors(directory, stored, one_ahead(stored, fill, "to NEO"), shard_bytes)
        write_companions(directory, sizes, dtype or source.main_dtype, tokenizer)
    return listed


def _neo_sizes(
    config: dict[str, Any],
    where: str | Path,
    pre_buffer_layers: int,
    patch_embedding_size: int,
    tokenizer: Any | None,
    vocab_size: int | None,
) -> NeoSizes:
    asked = beyond_qwen3(config)
    if config.get("model_type") not in ("qwen3", "qwen3_moe") or asked:
        what = f"sets {asked}" if asked else f"has the model_type {config.get('model_type')!r}"
        raise CheckpointError(
            f"{where}/config.json {what}: NEO starts from a plain Qwen3 or Qwen3-MoE, such as Qwen3-1.7B-Base"
        )
    if pre_buffer_layers < 0:
        raise CheckpointError(f"{pre_buffer_layers} pre-buffer layers: give 0 or more")
    ids = {}
    if tokenizer is not None:
        ids["image_start_token_id"] = tokenizer.convert_tokens_to_ids("<img>")
        ids["image_context_token_id"] = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    try:
        return NeoSizes(
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            pre_buffer_layers=pre_buffer_layers,
            post_llm_layers=config["num_hidden_layers"],
            vocab_size=_rows(config["vocab_size"], tokenizer) if vocab_size is None else vocab_size,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            patch_embedding_size=patch_embedding_size,
            # transformers 5 writes the base of the rotation into a dictionary
            rope_theta=(config.get("rope_parameters") or config)["rope_theta"],
            norm_epsilon=config["rms_norm_eps"],
            max_positions=config["max_position_embeddings"],
            **experts_from_qwen3(config),
            **ids,
        )
    except KeyError as missing:
        raise CheckpointError(
            f"{where}/config.json: key {missing} is missing: give the config.json of a Qwen3"
        ) from missing
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}/config.json: {error}: give the config.json of a Qwen3") from error


def _rows(qwen3_rows: int, tokenizer: Any | None) -> int:
    """Rows of the embedding: those of Qwen3, of which 267 of 151936 are unused and hold NEO's tokens.

    Published NEOs keep them all. More only for a larger tokenizer, rounded up for tensor parallelism.
    """
    if tokenizer is None or len(tokenizer) <= qwen3_rows:
        return qwen3_rows
    return math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _check_tensors(
    source: SafetensorsDirectory, sizes: NeoSizes, qwen3_rows: int, allow_missing: Sequence[str]
) -> list[str]:
    """Checks that the source is exactly the Qwen3 of these sizes: a NEO without what NEO adds."""
    # Of both forms "separate" has Qwen3's own tensors in their own shapes.
    as_stored = hf_tensors(sizes.replace(vocab_size=qwen3_rows, attention_form="separate"))
    expected = {tensor.qwen3: tensor.shape for tensor in as_stored.values() if tensor.qwen3}
    head = qwen3_name(LM_HEAD)
    found = source.shapes_with_tied_head(head, qwen3_name(WORD_EMBEDDING), sizes.tie_word_embeddings)
    if head not in found:
        expected.pop(head, None)  # a missing head is the embedding
    return check_shapes(found, expected, str(source.directory), allow_missing)


def _tensors(sizes: NeoSizes, key_hw_init: KeyHwInit) -> dict[str, HfTensor]:
    """The tensors of the new NEO; the table has the published way."""
    tensors = hf_tensors(sizes)
    for layer in range(sizes.pre_buffer_layers, sizes.num_layers) if key_hw_init == "zero-norm" else ():
        attention = f"{DECODER}layers.{layer}.self_attn."
        changed = {"k_proj_hw": Start("rows and columns", of=f"{attention}k_proj.weight")}
        changed |= dict.fromkeys(("k_norm_h", "k_norm_w"), Start("constant", 0.0))
        for name, start in changed.items():
            tensors[f"{attention}{name}.weight"] = replace(tensors[f"{attention}{name}.weight"], start=start)
    return tensors
