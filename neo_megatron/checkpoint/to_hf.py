"""A Megatron checkpoint, saved on any layout -> a complete Hugging Face directory that transformers loads and serves.

It holds the weights, `config.json`, the tokenizer with NEO's tokens and the chat template, the generation and the
image settings, and the code of `neo_megatron/hf` for `trust_remote_code`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import neo_megatron
from neo_megatron.checkpoint.generation_branch import GenerationBranch
from neo_megatron.checkpoint.hf_directory import output_directory, write_json, write_safetensors
from neo_megatron.checkpoint.initialization import StartValues, missing_starts
from neo_megatron.checkpoint.names import Start, TensorRow, hf_tensors, tensor_table
from neo_megatron.checkpoint.reader import open_megatron
from neo_megatron.checkpoint.streaming import StoredTensor, one_ahead
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes

SHARD_BYTES = 5 * 10**9

AUTO_MAP = {
    "AutoConfig": "configuration_neo.NEOChatConfig",
    "AutoModel": "modeling_neo.NEOChatModel",
    "AutoModelForCausalLM": "modeling_neo.NEOChatModel",
    "AutoModelForImageTextToText": "modeling_neo.NEOChatModel",
}
PROCESSOR_MAP = {
    "AutoProcessor": "processing_neo.NEOProcessor",
    "AutoImageProcessor": "image_processing_neo.NEOImageProcessor",
}
CODE = (
    *("attention_neo.py", "chat_neo.py", "configuration_neo.py", "decoder_neo.py", "generation_neo.py"),
    *("image_processing_neo.py", "kinds_neo.py", "loss_neo.py", "messages_neo.py", "modeling_neo.py"),
    *("positions_neo.py", "processing_neo.py", "rows_neo.py", "serving_neo.py", "vision_neo.py"),
)
# Training and exports share these files; only the import of a sibling changes.
SHARED_CODE = {
    "data/image.py": "images_neo.py",
    "data/image_limits.py": "image_limits_neo.py",
    "errors.py": "errors_neo.py",
    "data/tags.py": "tags_neo.py",
    "model/mask.py": "mask_neo.py",
}


def convert_megatron_to_hf(
    megatron_directory: str | Path,
    output: str | Path,
    tokenizer: Any,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
    generation_branch: str | Path | None = None,
) -> dict[str, Start]:
    """Writes ``output`` from the latest iteration, or the one given.

    Args:
        megatron_directory: what `--save` filled, or one ``iter_XXXXXXX`` or ``release`` directory of it.
        tokenizer: the transformers tokenizer of the training data, with NEO's tokens.
        shard_bytes: largest weight file.
        dtype: of all tensors; by default each keeps its own, and every bit.
        allow_missing: patterns of Megatron names that may be missing; the Hugging Face tensors of such a one start as
            in a NEO made from a Qwen3, drawn from seed 0.
        generation_branch: directory of the NEO-unify (SenseNova-U1) whose understanding branch was trained: the export
            is complete again, with the generation tensors, the configuration and the tokenizer of that directory, to be
            run by the code that was published with it.

    Returns:
        The missing tensors by their Hugging Face names, and what they start as.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the tokenizer is not the model's;
            ``output`` exists; the checkpoint is broken; ``generation_branch`` is of other sizes or has no such branch.
    """
    neo = open_megatron(megatron_directory, allow_missing)
    source, sizes, missing = neo.source, neo.sizes, neo.missing
    rows = {row.megatron: row for row in tensor_table(sizes)}
    check_tokenizer(tokenizer, sizes)
    branch = GenerationBranch(generation_branch, sizes) if generation_branch is not None else None
    listed = missing_starts([name for key in missing for name in rows[key].hf], hf_tensors(sizes))
    starts = StartValues(seed=0, head_dim=sizes.head_dim, read=partial(_read_hf, source, rows.values()))

    def fill(stored: StoredTensor, tensor: Tensor) -> None:
        row = rows[stored.name]
        if row.megatron not in missing:
            source.read_into(row.megatron, tensor)
        else:
            for part, view in zip(row.hf.values(), row.views(tensor), strict=True):
                starts.fill(view, part)

    largest = max(neo.shapes, key=lambda key: math.prod(neo.shapes[key]))
    merged = [
        StoredTensor(key, row.megatron_shape, dtype or source.dtype(largest if key in missing else key))
        for key, row in rows.items()
    ]
    stored = [
        StoredTensor(name, part.shape, tensor.dtype) for tensor in merged for name, part in rows[tensor.name].hf.items()
    ]
    tensors = one_ahead(merged, fill, "to Hugging Face")
    values = (view for row, tensor in zip(rows.values(), tensors, strict=True) for view in row.views(tensor))
    with output_directory(output) as directory:
        if branch is not None:
            write_safetensors(directory, [*stored, *branch.stored], chain(values, branch.values()), shard_bytes)
            branch.write_companions(directory)
        else:
            write_safetensors(directory, stored, values, shard_bytes)
            main_dtype = Counter(tensor.dtype for tensor in stored).most_common(1)[0][0]
            write_companions(directory, sizes, main_dtype, tokenizer)
    return listed


def _read_hf(source: TorchDistDirectory, rows: Iterable[TensorRow], name: str) -> Tensor:
    """One Hugging Face tensor."""
    row = next(row for row in rows if name in row.hf)
    return dict(zip(row.hf, row.split(source.read(row.megatron)), strict=True))[name]


def write_companions(directory: Path, sizes: NeoSizes, dtype: torch.dtype, tokenizer: Any | None) -> None:
    """Writes everything but the weights; without a tokenizer, only what the model needs."""
    config = {**sizes.to_hf(), "auto_map": AUTO_MAP, "dtype": str(dtype).removeprefix("torch.")}
    _write_code(directory)
    if tokenizer is not None:
        ids = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": tokenizer.pad_token_id}
        config |= ids
        write_json(directory / "generation_config.json", ids)
        _write_processor(directory, sizes, tokenizer)
    write_json(directory / "config.json", config)


def check_tokenizer(tokenizer: Any, sizes: NeoSizes) -> None:
    """Refuses a tokenizer whose image tokens are not the model's or whose ids the embedding does not hold."""
    for token, expected in sizes.image_token_ids.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise CheckpointError(
                f"{tokenizer.name_or_path}: {token} has the id {found}, the model was trained with {expected}: "
                "give --tokenizer the directory that preprocessing used"
            )
    if len(tokenizer) > sizes.vocab_size:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: {len(tokenizer)} tokens, the model has {sizes.vocab_size}: "
            "give --tokenizer the directory that preprocessing used"
        )


def _write_code(directory: Path) -> None:
    package = Path(neo_megatron.__file__).parent
    for name in CODE:
        (directory / name).write_text((package / "hf" / name).read_text())
    for name, exported in SHARED_CODE.items():
        text = (package / name).read_text()
        for shared, sibling in SHARED_CODE.items():
            module = shared.removesuffix(".py").replace("/", ".")
            text = text.replace(f"from neo_megatron.{module} import", f"from .{sibling.removesuffix('.py')} import")
        (directory / exported).write_text(text)


def _write_processor(directory: Path, sizes: NeoSizes, tokenizer: Any) -> None:
    # The generic class reads tokenizer.json as it is in transformers 4.57 and in 5; Qwen's own differs between them.
    (directory / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    processor = {"processor_class": "NEOProcessor", "auto_map": PROCESSOR_MAP}
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": tokenizer.pad_token,
            "padding_side": "left",
            "model_max_length": sizes.max_positions,
            "model_input_names": ["input_ids", "attention_mask"],
            "processor_class": "NEOProcessor",
            "auto_map": {"AutoProcessor": PROCESSOR_MAP["AutoProcessor"]},
        },
    )
    limits = {"min_pixels": sizes.min_pixels, "max_pixels": sizes.max_pixels}
    write_json(
        directory / "preprocessor_config.json", {**processor, **limits, "image_processor_type": "NEOImageProcessor"}
    )
    write_json(directory / "processor_config.json", {"processor_class": "NEOProcessor", "auto_map": PROCESSOR_MAP})
    template = (Path(neo_megatron.__file__).parent / "hf" / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template)
