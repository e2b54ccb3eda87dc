"""A trained pre-buffer by itself: NEO's visual front end, to be put in front of another Qwen3 of the same width.

A directory of the form of Hugging Face with `model_type: neo_pre_buffer` holds, under the names they have in a NEO, the
patch embedding and the pre-buffer's layers. Beside them ``picture_tokens.weight``, the embeddings of ``<img>`` and
``</img>``: they frame every picture that the pre-buffer has seen, and a Qwen3 has nothing trained in their place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neo_megatron.checkpoint.either_form import EitherForm
from neo_megatron.checkpoint.hf_directory import (
    SafetensorsDirectory,
    read_json,
    whole_directory,
    write_json,
    write_safetensors,
)
from neo_megatron.checkpoint.names import DECODER, PATCH_EMBEDDING, WORD_EMBEDDING, Shape, check_shapes, hf_shapes
from neo_megatron.checkpoint.published_config import added_token_ids
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.model.config import NeoSizes

MODEL_TYPE = "neo_pre_buffer"
PICTURE_TOKENS = ("<img>", "</img>")
PICTURE_ROWS = "picture_tokens.weight"
# What a layer of the pre-buffer and one of the post-LLM must share, as they are layers of one decoder.
_SHARED = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
    *("rope_theta", "norm_epsilon"),
)


def extract_pre_buffer(neo: EitherForm, output: str | Path, shard_bytes: int) -> None:
    """Writes ``output``; values and types stay as they are.

    Raises:
        ValueError: a NEO without a pre-buffer; nothing tells the id of ``</img>``; ``output`` exists.
    """
    if not neo.sizes.pre_buffer_layers:
        raise ValueError(
            f"{neo.directory}: has no pre-buffer: give a NEO that has one (extra_num_layers in its config.json)"
        )
    rows = picture_token_ids(neo.sizes, added_token_ids(neo.directory), neo.directory)
    shapes = _shapes(neo.sizes)
    dtypes = {tensor.name: tensor.dtype for tensor in neo.stored}
    kept = [tensor for tensor in neo.stored if tensor.name in shapes]
    picture_rows = StoredTensor(PICTURE_ROWS, shapes[PICTURE_ROWS], dtypes[WORD_EMBEDDING])

    def values() -> Iterator[Tensor]:
        yield from neo.values(tensor.name for tensor in kept)
        (embedding,) = neo.values([WORD_EMBEDDING])
        yield embedding[rows]

    config = {**neo.sizes.replace(post_llm_layers=0).to_hf(), "model_type": MODEL_TYPE}
    del config["architectures"]
    with whole_directory(output) as partial:
        write_safetensors(partial, [*kept, picture_rows], values(), shard_bytes)
        write_json(partial / "config.json", config)


def picture_token_ids(sizes: NeoSizes, added: dict[str, int], where: Path) -> list[int]:
    """The ids of `PICTURE_TOKENS`; without a tokenizer those that follow from the order in which NEO adds its tokens.

    Args:
        added: ids of a tokenizer's added tokens, or none.
    """
    start, end = sizes.image_start_token_id, added.get("</img>")
    if end is None and start == sizes.image_context_token_id + 1:
        end = start + 1  # <IMG_CONTEXT>, <img> and </img> were added one behind the other
    if end is None or end >= sizes.vocab_size:
        raise ValueError(f"{where}: nothing there tells the id of </img>: put the model's tokenizer.json beside it")
    return [start, end]


@dataclass(frozen=True)
class PreBuffer:
    """An extracted pre-buffer, known to be whole.

    Args:
        source: its tensors.
        sizes: of the NEO that it was part of, without a post-LLM.
    """

    source: SafetensorsDirectory
    sizes: NeoSizes

    def check_fits(self, sizes: NeoSizes, where: str | Path) -> None:
        """Raises ValueError, naming what differs, where this pre-buffer's layers are no layers of such a NEO."""
        differing = [
            f"{key} {getattr(self.sizes, key)} (there {getattr(sizes, key)})"
            for key in _SHARED
            if getattr(self.sizes, key) != getattr(sizes, key)
        ]
        if differing:
            raise ValueError(
                f"{self.source.directory} does not fit in front of {where}: the pre-buffer has {', '.join(differing)}; "
                "give a Qwen3 of the same shape"
            )


def open_pre_buffer(directory: str | Path) -> PreBuffer:
    """Reads headers only.

    Raises:
        ValueError: not what `extract_pre_buffer` writes, or a tensor is missing, unexpected or of another shape.
    """
    directory = Path(directory)
    config: dict[str, Any] = read_json(directory / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{directory}: no pre-buffer (model_type {config.get('model_type')!r}): take one out of a NEO with "
            "extract-pre-buffer"
        )
    source, sizes = SafetensorsDirectory(directory), NeoSizes.from_hf(config)
    check_shapes(source.shapes, _shapes(sizes), str(directory))
    return PreBuffer(source, sizes)


def _shapes(sizes: NeoSizes) -> dict[str, Shape]:
    """What belongs to the pre-buffer of a NEO of these sizes."""
    layers = tuple(f"{DECODER}layers.{number}." for number in range(sizes.pre_buffer_layers))
    shapes = {name: shape for name, shape in hf_shapes(sizes).items() if name.startswith((PATCH_EMBEDDING, *layers))}
    return shapes | {PICTURE_ROWS: (len(PICTURE_TOKENS), sizes.hidden_size)}
