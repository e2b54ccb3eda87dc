"""Extracts a trained pre-buffer, NEO's visual front end, to put it in front of another Qwen3 of the same width.

A directory of the form of Hugging Face with `model_type: neo_pre_buffer` holds, under the names they have in a NEO, the
patch embedding and the pre-buffer's layers. It also holds ``picture_tokens.weight``, the embeddings of ``<img>`` and
``</img>``: they frame every image that the pre-buffer has seen, and a Qwen3 has nothing trained in their place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.hf_directory import SafetensorsDirectory, output_directory, write_json, write_safetensors
from neo_megatron.checkpoint.names import DECODER, PATCH_EMBEDDING, WORD_EMBEDDING, Shape, check_shapes, hf_shapes
from neo_megatron.checkpoint.neo_directory import sizes_of
from neo_megatron.checkpoint.published_config import added_token_ids
from neo_megatron.checkpoint.reader import EitherForm
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes
from neo_megatron.paths import Wanted, check_path

MODEL_TYPE = "neo_pre_buffer"
IMAGE_TOKENS = ("<img>", "</img>")
IMAGE_ROWS = "picture_tokens.weight"  # the key in checkpoints since version 0.1.0
# Writes trained values into a tensor of as many values.
TrainedPart = Callable[[Tensor], None]
# Sizes that pre-buffer and post-LLM share, because they are layers of one decoder.
_SHARED = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
    *("rope_theta", "norm_epsilon", "attention_form"),
    *("num_experts", "experts_per_token", "expert_ffn_hidden_size", "norm_topk_prob"),
)
# Sizes that concern only images; a Qwen3 has none of them.
_DECIDED = ("rope_theta_hw", "rope_theta_patch", "max_positions_hw", "min_pixels", "max_pixels")


def extract_pre_buffer(neo: EitherForm, output: str | Path, shard_bytes: int) -> None:
    """Writes ``output``; values and types stay as they are.

    Raises:
        CheckpointError: a NEO without a pre-buffer; nothing tells the id of ``</img>``; ``output`` exists.
    """
    if not neo.sizes.pre_buffer_layers:
        raise CheckpointError(
            f"{neo.directory}: has no pre-buffer: give a NEO that has one (extra_num_layers in its config.json)"
        )
    rows = image_token_ids(neo.sizes, added_token_ids(neo.directory), neo.directory)
    shapes = _shapes(neo.sizes)
    dtypes = {tensor.name: tensor.dtype for tensor in neo.stored}
    kept = [tensor for tensor in neo.stored if tensor.name in shapes]
    image_rows = StoredTensor(IMAGE_ROWS, shapes[IMAGE_ROWS], dtypes[WORD_EMBEDDING])

    def values() -> Iterator[Tensor]:
        yield from neo.values(tensor.name for tensor in kept)
        (embedding,) = neo.values([WORD_EMBEDDING])
        yield embedding[rows]

    config = {**neo.sizes.replace(post_llm_layers=0).to_hf(), "model_type": MODEL_TYPE}
    del config["architectures"]
    with output_directory(output) as unfinished:
        write_safetensors(unfinished, [*kept, image_rows], values(), shard_bytes)
        write_json(unfinished / "config.json", config)


def image_token_ids(sizes: NeoSizes, known: dict[str, int], where: Path) -> list[int]:
    """The ids of `IMAGE_TOKENS`; without a tokenizer those that follow from the order in which NEO adds its tokens.

    Args:
        known: ids of tokens in the model's tokenizer, if it was looked at.
    """
    start, end = sizes.image_start_token_id, known.get("</img>")
    if end is None and start == sizes.image_context_token_id + 1:
        end = start + 1  # <IMG_CONTEXT>, <img> and </img> were added one after the other
    if end is None or max(start, end) >= sizes.vocab_size:
        raise CheckpointError(
            f"{where}: nothing there tells the id of </img>: put the model's tokenizer.json next to it"
        )
    return [start, end]


@dataclass(frozen=True)
class PreBuffer:
    """An extracted pre-buffer, checked to be complete.

    Args:
        source: its tensors.
        sizes: of the NEO that it was part of, without a post-LLM.
    """

    source: SafetensorsDirectory
    sizes: NeoSizes

    def sizes_in_front_of(self, sizes: NeoSizes, where: str | Path) -> NeoSizes:
        """Sizes of a new NEO: those given, with the image sizes of this pre-buffer.

        Raises:
            CheckpointError: layers of this pre-buffer do not fit such a NEO; the message names what differs.
        """
        differing = [
            f"{key} {getattr(self.sizes, key)} (there {getattr(sizes, key)})"
            for key in _SHARED
            if getattr(self.sizes, key) != getattr(sizes, key)
        ]
        if differing:
            raise CheckpointError(
                f"{self.source.directory} does not fit in front of {where}: the pre-buffer has {', '.join(differing)}; "
                "give a Qwen3 of the same shape"
            )
        return sizes.replace(**{key: getattr(self.sizes, key) for key in _DECIDED})

    def parts(self, sizes: NeoSizes, tokenizer: Any | None) -> dict[str, TrainedPart]:
        """Hugging Face name -> function that writes trained values into that tensor of a new NEO, or into its rows."""
        parts: dict[str, TrainedPart] = {
            name: partial(self.source.read_into, name) for name in self.source.shapes if name != IMAGE_ROWS
        }
        known = {} if tokenizer is None else {token: tokenizer.convert_tokens_to_ids(token) for token in IMAGE_TOKENS}
        ids = image_token_ids(sizes, known, self.source.directory)

        def frame_images(embedding: Tensor) -> None:
            rows = torch.empty(len(ids), embedding.shape[1], dtype=embedding.dtype)
            self.source.read_into(IMAGE_ROWS, rows)
            embedding[ids] = rows

        return parts | {WORD_EMBEDDING: frame_images}


def open_pre_buffer(directory: str | Path) -> PreBuffer:
    """Reads headers only.

    Raises:
        CheckpointError: not what `extract_pre_buffer` writes, or a tensor is missing, unexpected or of another shape.
    """
    directory = Path(directory)
    check_path(directory, Wanted.PRE_BUFFER)
    config: dict[str, Any] = read_json(directory / "config.json")
    source, sizes = SafetensorsDirectory(directory), sizes_of(config, directory)
    check_shapes(source.shapes, _shapes(sizes), str(directory))
    return PreBuffer(source, sizes)


def _shapes(sizes: NeoSizes) -> dict[str, Shape]:
    """The tensors that belong to the pre-buffer of a NEO of these sizes."""
    layers = tuple(f"{DECODER}layers.{number}." for number in range(sizes.pre_buffer_layers))
    shapes = {name: shape for name, shape in hf_shapes(sizes).items() if name.startswith((PATCH_EMBEDDING, *layers))}
    return shapes | {IMAGE_ROWS: (len(IMAGE_TOKENS), sizes.hidden_size)}
