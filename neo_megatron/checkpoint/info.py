"""Describes a checkpoint: sizes, layers, dtypes, tokens, and one hash of all weights.

The hash is over names, shapes, types and values of the tensors by their Hugging Face names, and so is the same for any
sharding and in either form: two checkpoints with one hash hold the same weights. It is the SHA-256 of a line
``NAME DTYPE SHAPE SHA256-OF-THE-VALUES`` for each tensor, sorted by name; values are little-endian, a tied head that
repeats the embedding is left out.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.names import DECODER, PATCH_EMBEDDING
from neo_megatron.checkpoint.pickled_directory import open_weights
from neo_megatron.checkpoint.published_config import MODEL_TYPE, added_token_ids, is_neo
from neo_megatron.checkpoint.reader import is_megatron, open_either
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes
from neo_megatron.paths import Wanted, check_path


@dataclass(frozen=True)
class Contents:
    """An opened checkpoint.

    Args:
        lines: label -> text, in the order in which they are shown.
        stored: what each tensor is.
        values: names -> the tensors, one in memory at a time.
    """

    lines: dict[str, str]
    stored: list[StoredTensor]
    values: Callable[[Iterable[str]], Iterator[Tensor]]


def contents(directory: str | Path, allow_pickle: bool = False) -> Contents:
    """Reads headers only: a NEO in either form, or any directory with safetensors, such as a Qwen3.

    Raises:
        CheckpointError: no checkpoint there, or a broken one.
    """
    directory = Path(directory)
    check_path(directory, Wanted.EITHER_FORM)
    if is_megatron(directory) or _is_neo(directory, allow_pickle):
        return _neo(directory, allow_pickle)
    config, source = read_json(directory / "config.json"), open_weights(directory, allow_pickle)
    stored = [StoredTensor(name, shape, source.dtype(name)) for name, shape in sorted(source.shapes.items())]
    lines = {"checkpoint": f"{directory}, of the type {config.get('model_type')!r}"}
    counts = {key: config.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    lines |= {key: str(count) for key, count in counts.items() if type(count) is int}
    lines |= _totals(stored)
    return Contents(lines, stored, lambda names: map(source.read, names))


def weights_hash(opened: Contents) -> str:
    """SHA-256 in hexadecimal, see above; reads every byte, with a progress bar."""
    lines = []
    names = [tensor.name for tensor in opened.stored]
    total = sum(tensor.nbytes for tensor in opened.stored)
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", leave=False) as progress:
        for tensor, value in zip(opened.stored, opened.values(names), strict=True):
            digest = hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            lines.append(f"{tensor.name} {_type(tensor)} {list(tensor.shape)} {digest}\n")
            progress.update(tensor.nbytes)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _is_neo(directory: Path, allow_pickle: bool) -> bool:
    config = read_json(directory / "config.json")
    return config.get("model_type") == MODEL_TYPE or is_neo(open_weights(directory, allow_pickle).shapes)


def _neo(directory: Path, allow_pickle: bool) -> Contents:
    opened = open_either(directory, allow_pickle)
    form = "Megatron's form" if opened.common_state else "Hugging Face form"
    lines = {"checkpoint": f"{opened.directory}, a NEO in {form}"}
    lines |= {f"corrected {number}": sentence for number, sentence in enumerate(opened.said, start=1)}
    lines |= _sizes(opened.sizes) | _totals(opened.stored)
    lines |= {f"  {part}": _amount(stored) for part, stored in _parts(opened.stored, opened.sizes).items()}
    lines["tokens"] = _tokens(opened.sizes, added_token_ids(directory))
    if opened.common_state:
        lines["training"] = _training(opened.common_state)
        lines["optimizer state"] = f"{opened.further_bytes / 1e6:,.1f} MB"
    return Contents(lines, opened.stored, opened.values)


def _sizes(sizes: NeoSizes) -> dict[str, str]:
    return {
        "layers": f"{sizes.num_layers}: pre-buffer {sizes.pre_buffer_layers}, post-LLM {sizes.post_llm_layers}",
        "sizes": f"hidden {sizes.hidden_size}, feed-forward {sizes.ffn_hidden_size}, {sizes.num_attention_heads} query "
        f"and {sizes.num_query_groups} key-value heads of {sizes.head_dim}, patch embedding "
        f"{sizes.patch_embedding_size}, attention {sizes.attention_form}",
        "rotary bases": f"t {sizes.rope_theta:g}, h and w {sizes.rope_theta_hw:g}, patches {sizes.rope_theta_patch:g}; "
        f"{sizes.max_positions} positions",
    }


def _parts(stored: list[StoredTensor], sizes: NeoSizes) -> dict[str, list[StoredTensor]]:
    parts: dict[str, list[StoredTensor]] = {"patch embedding": [], "pre-buffer": [], "post-LLM": []}
    for tensor in stored:
        _, in_layer, rest = tensor.name.partition(DECODER + "layers.")
        if in_layer:
            part = "pre-buffer" if int(rest.split(".")[0]) < sizes.pre_buffer_layers else "post-LLM"
        else:
            part = "patch embedding" if tensor.name.startswith(PATCH_EMBEDDING) else "embedding, norm, head"
        parts.setdefault(part, []).append(tensor)
    return parts


def _totals(stored: list[StoredTensor]) -> dict[str, str]:
    return {"tensors": f"{len(stored)}, {_amount(stored)}"}


def _amount(stored: list[StoredTensor]) -> str:
    by_type: Counter[str] = Counter()
    for tensor in stored:
        by_type[_type(tensor)] += math.prod(tensor.shape)
    numbers = ", ".join(f"{count:,} {dtype}" for dtype, count in by_type.most_common())
    return f"{numbers or 'none'}; {sum(tensor.nbytes for tensor in stored) / 1e6:,.1f} MB"


def _tokens(sizes: NeoSizes, added: dict[str, int]) -> str:
    tied = "embedding and head are one" if sizes.tie_word_embeddings else "head apart"
    added_text = f"; {len(added)} added tokens in its tokenizer" if added else ""
    return (
        f"{sizes.vocab_size} rows, {tied}; <img> {sizes.image_start_token_id}, "
        f"<IMG_CONTEXT> {sizes.image_context_token_id}{added_text}"
    )


def _training(state: dict[str, Any]) -> str:
    packs, length = (getattr(state["args"], name, None) or 0 for name in ("consumed_train_samples", "seq_length"))
    if type(packs) is not int or type(length) is not int:
        raise CheckpointError(f"a checkpoint whose arguments count {packs!r} packs of {length!r} tokens: copy it again")
    if not packs:
        return "none: converted from Hugging Face form"
    lengths = getattr(state["args"], "pack_lengths", None) or [[0, length]]  # runs of earlier versions have one
    if not isinstance(lengths, list) or not all(
        isinstance(entry, list) and list(map(type, entry)) == [int, int] for entry in lengths
    ):
        raise CheckpointError(f"a checkpoint whose arguments have packs of {lengths!r} tokens: copy it again")
    ends = [*(start for start, _ in lengths[1:]), packs]
    parts = [(min(end, packs) - start, length) for (start, length), end in zip(lengths, ends, strict=True)]
    read = [(count, length) for count, length in parts if count > 0]
    tokens = sum(count * length for count, length in read)
    told = " and ".join(f"{count:,} packs of {length:,} tokens" for count, length in read)
    return f"iteration {state.get('iteration')}, {told}: {tokens:,} tokens"


def _type(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
