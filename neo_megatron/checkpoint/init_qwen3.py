"""A Qwen3 Hugging Face directory -> a NEO Hugging Face directory to start stage 1 from (spec: the initialisation).

Qwen3's layer i becomes layer ``pre_buffer_layers + i``, unchanged, and computes on text what it computed before: its
new keys for rows and columns are zero. The pre-buffer and the patch embedding are drawn from a seed.

Zero keys can be made in two ways (`KeyHwInit`):
    published  the projection W_k_hw is zero. RMSNorm of zero is zero, but its derivative there is 1/sqrt(eps) = 1,000.
    zero-norm  the weights of the norms behind W_k_hw are zero; W_k_hw itself is made from W_k as W_q_hw is from W_q.
               The gradient then reaches the norms at ordinary size. docs/key_hw_init.md compares both.
"""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from neo_megatron.checkpoint.hf_directory import (
    SafetensorsDirectory,
    StoredTensor,
    read_json,
    whole_directory,
    write_safetensors,
)
from neo_megatron.checkpoint.names import DECODER, LM_HEAD, PATCH_EMBEDDING, WORD_EMBEDDING, check_shapes, hf_shapes
from neo_megatron.checkpoint.pickled_directory import open_weights
from neo_megatron.checkpoint.to_hf import SHARD_BYTES, check_tokenizer, write_companions
from neo_megatron.model.config import NeoSizes

INIT_STD = 0.02
VOCABULARY_MULTIPLE = 128

KeyHwInit = Literal["published", "zero-norm"]


def init_from_qwen3(
    qwen3_directory: str | Path,
    output: str | Path,
    pre_buffer_layers: int,
    patch_embedding_size: int = 1024,
    tokenizer: Any | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    key_hw_init: KeyHwInit = "published",
    shard_bytes: int = SHARD_BYTES,
    allow_pickle: bool = False,
) -> None:
    """Writes ``output`` in Qwen3's own type.

    Args:
        tokenizer: a transformers tokenizer with NEO's tokens; saved with the model. Without one, NEO's tokens are
            taken to have the ids they have on Qwen3.
        vocab_size: rows of the embedding and the head; by default Qwen3's, and more only if the tokenizer needs them.
            Further rows are zero, surplus rows are cut.
        key_hw_init: what makes the post-LLM's keys for rows and columns zero, see above.
        allow_pickle: take pickled weights where there are no safetensors, see `pickled_directory.py`.

    Raises:
        ValueError: not a whole Qwen3 in it; sizes NEO does not have; a tokenizer larger than ``vocab_size``.
    """
    config = read_json(Path(qwen3_directory) / "config.json")
    source = open_weights(qwen3_directory, allow_pickle)
    sizes = _neo_sizes(config, qwen3_directory, pre_buffer_layers, patch_embedding_size, tokenizer, vocab_size)
    if tokenizer is None:
        warnings.warn(
            f"no tokenizer given: <IMG_CONTEXT> and <img> get Qwen3's ids {sizes.image_context_token_id} and "
            f"{sizes.image_start_token_id}; give --tokenizer for any other tokenizer",
            stacklevel=2,
        )
    else:
        check_tokenizer(tokenizer, sizes)
    _check_tensors(source, sizes, qwen3_rows=config["vocab_size"])
    dtype = source.dtype(_qwen3_name(WORD_EMBEDDING))
    shapes = hf_shapes(sizes)
    stored = [StoredTensor(name, shape, dtype) for name, shape in shapes.items()]
    draw = torch.Generator().manual_seed(seed)
    values = (_value(name, shape, source, sizes, draw, key_hw_init).to(dtype) for name, shape in shapes.items())
    with whole_directory(output) as partial:
        write_safetensors(partial, stored, values, shard_bytes)
        write_companions(partial, sizes, dtype, tokenizer)


def _neo_sizes(
    config: dict[str, Any],
    where: str | Path,
    pre_buffer_layers: int,
    patch_embedding_size: int,
    tokenizer: Any | None,
    vocab_size: int | None,
) -> NeoSizes:
    unsupported = [key for key in ("attention_bias", "use_sliding_window", "rope_scaling") if config.get(key)]
    if config.get("model_type") != "qwen3" or unsupported:
        what = f"sets {unsupported[0]}" if unsupported else f"has the model_type {config.get('model_type')!r}"
        raise ValueError(f"{where}/config.json {what}: NEO starts from a plain Qwen3, such as Qwen3-1.7B-Base")
    if pre_buffer_layers < 0:
        raise ValueError(f"{pre_buffer_layers} pre-buffer layers: give 0 or more")
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
            vocab_size=vocab_size or _rows(config["vocab_size"], tokenizer),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            patch_embedding_size=patch_embedding_size,
            # transformers 5 writes the base of the rotation into a dictionary
            rope_theta=float((config.get("rope_parameters") or config)["rope_theta"]),
            norm_epsilon=config["rms_norm_eps"],
            max_positions=config["max_position_embeddings"],
            **ids,
        )
    except KeyError as missing:
        raise ValueError(f"{where}/config.json: key {missing} is missing: give the config.json of a Qwen3") from missing


def _rows(qwen3_rows: int, tokenizer: Any | None) -> int:
    """Qwen3's rows as they are: 267 of its 151936 are unused and hold NEO's tokens, and published NEOs keep them all.

    More only for a larger tokenizer, and then a number that tensor parallelism can divide.
    """
    if tokenizer is None or len(tokenizer) <= qwen3_rows:
        return qwen3_rows
    return math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _qwen3_name(name: str) -> str:
    return name.removeprefix("language_model.")


def _check_tensors(source: SafetensorsDirectory, sizes: NeoSizes, qwen3_rows: int) -> None:
    """The source must be exactly the Qwen3 of these sizes: a NEO without what NEO adds."""
    expected = {
        _qwen3_name(name): shape
        for name, shape in hf_shapes(sizes.replace(pre_buffer_layers=0, vocab_size=qwen3_rows)).items()
        if not name.startswith(PATCH_EMBEDDING) and "_hw." not in name and "_norm_" not in name
    }
    head = _qwen3_name(LM_HEAD)
    found = source.shapes_with_tied_head(head, _qwen3_name(WORD_EMBEDDING), sizes.tie_word_embeddings)
    if head not in found:
        expected.pop(head, None)  # a missing head is the embedding
    check_shapes(found, expected, str(source.directory))


def _value(
    name: str,
    shape: tuple[int, ...],
    source: SafetensorsDirectory,
    sizes: NeoSizes,
    draw: torch.Generator,
    key_hw_init: KeyHwInit,
) -> Tensor:
    """One tensor of the new NEO."""
    if name.startswith(PATCH_EMBEDDING):
        # PyTorch draws both weight and bias of a convolution from within 1/sqrt(fan_in).
        kernel = hf_shapes(sizes)[name.removesuffix("bias").removesuffix("weight") + "weight"]
        bound = 1 / math.sqrt(math.prod(kernel[1:]))
        return torch.empty(shape).uniform_(-bound, bound, generator=draw)
    if name in (WORD_EMBEDDING, LM_HEAD):
        stored = _qwen3_name(name)
        rows = source.read(stored if stored in source.shapes else _qwen3_name(WORD_EMBEDDING))[: shape[0]]
        return torch.cat([rows, rows.new_zeros(shape[0] - len(rows), shape[1])])
    if not name.startswith(DECODER + "layers."):
        return source.read(_qwen3_name(name))
    number, _, rest = name.removeprefix(DECODER + "layers.").partition(".")
    qwen3_layer = int(number) - sizes.pre_buffer_layers
    if qwen3_layer >= 0 and key_hw_init == "zero-norm" and rest.startswith("self_attn.k_norm_"):
        return torch.zeros(shape)
    if "norm" in rest and (qwen3_layer < 0 or "_norm_" in rest):
        return torch.ones(shape)
    if qwen3_layer < 0:
        return torch.empty(shape).normal_(0, INIT_STD, generator=draw)
    if rest == "self_attn.k_proj_hw.weight" and key_hw_init == "published":
        return torch.zeros(shape)
    if rest.endswith("_proj_hw.weight"):
        return _rows_and_columns(source.read(f"model.layers.{qwen3_layer}.{rest.replace('_hw', '')}"), sizes.head_dim)
    return source.read(f"model.layers.{qwen3_layer}.{rest}")


def _rows_and_columns(projection: Tensor, head_dim: int) -> Tensor:
    """First and third quarter of every head's rows, twice: for h and for w."""
    quarters = projection.unflatten(0, (-1, 4, head_dim // 4))
    return quarters[:, [0, 2, 0, 2]].flatten(0, 2)
