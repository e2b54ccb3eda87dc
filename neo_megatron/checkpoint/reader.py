"""A NEO in Hugging Face form or in Megatron's, read as the same named tensors."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neo_megatron.checkpoint.names import check_shapes, hf_shapes, tensor_table
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.to_hf import MODEL_PREFIXES, saved_sizes
from neo_megatron.checkpoint.torch_dist import TRACKER, TorchDistDirectory
from neo_megatron.model.config import NeoSizes


@dataclass(frozen=True)
class EitherForm:
    """A NEO opened by `open_either`, in the form of Hugging Face or of Megatron.

    Args:
        directory: where it lies; of a Megatron checkpoint the iteration.
        sizes: of the model.
        said: what was put right in its `config.json`.
        stored: names, shapes and types in the order of the table; a tied head is not among them.
        common_state: what a Megatron checkpoint holds besides tensors; empty for Hugging Face's form.
        further_bytes: of the tensors that are not weights, such as the optimizer's state.
        values: names -> their tensors, one in memory at a time; quickest in the order of ``stored``.
    """

    directory: Path
    sizes: NeoSizes
    said: list[str]
    stored: list[StoredTensor]
    common_state: dict[str, Any]
    further_bytes: int
    values: Callable[[Iterable[str]], Iterator[Tensor]]


def is_megatron(directory: Path) -> bool:
    """Whether a directory is what `--save` filled, or one iteration of it."""
    saved = any((directory / name).exists() for name in (TRACKER, "metadata.json"))
    return saved and not (directory / "config.json").exists()


def open_either(directory: str | Path, allow_pickle: bool = False) -> EitherForm:
    """Reads headers only.

    Raises:
        CheckpointError: no NEO in either form; a tensor is missing, unexpected or of another shape; a file is broken.
    """
    directory = Path(directory)
    return _open_megatron(directory) if is_megatron(directory) else _open_hf(directory, allow_pickle)


def _open_hf(directory: Path, allow_pickle: bool) -> EitherForm:
    neo = open_neo(directory, allow_pickle)
    names = [name for row in tensor_table(neo.sizes) for name in row.hf]
    stored = [StoredTensor(name, neo.source.shapes[name], neo.source.dtype(name)) for name in names]
    return EitherForm(directory, neo.sizes, neo.said, stored, {}, 0, lambda names: map(neo.source.read, names))


def _open_megatron(directory: Path) -> EitherForm:
    source = TorchDistDirectory(directory)
    sizes = saved_sizes(source)
    rows = tensor_table(sizes)
    found = {key: shape for key, shape in source.shapes.items() if key.startswith(MODEL_PREFIXES)}
    check_shapes(found, {row.megatron: row.megatron_shape for row in rows}, str(source.directory))
    shapes = hf_shapes(sizes)
    stored = [StoredTensor(name, shapes[name], source.dtype(row.megatron)) for row in rows for name in row.hf]
    row_of = {name: row for row in rows for name in row.hf}

    def read(names: Iterable[str]) -> Iterator[Tensor]:
        held, parts = None, {}
        for name in names:
            if row_of[name] is not held:
                held = row_of[name]
                parts = dict(zip(held.hf, held.split(source.read(held.megatron)), strict=True))
            yield parts[name]

    further = sum(
        math.prod(shape) * source.dtype(key).itemsize for key, shape in source.shapes.items() if key not in found
    )
    return EitherForm(source.directory, sizes, [], stored, source.common_state(), further, read)
