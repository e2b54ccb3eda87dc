"""Opens a NEO in Hugging Face form or in Megatron's, as the same named tensors."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from neo_megatron.checkpoint.names import Shape, check_shapes, hf_shapes, tensor_table
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.torch_dist import TRACKER, TorchDistDirectory
from neo_megatron.errors import CheckpointError, ConfigError
from neo_megatron.model.config import NeoSizes, completed_sizes

_MODEL_PREFIXES = ("embedding.", "patch_embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class EitherForm:
    """A NEO opened by `open_either`, in the form of Hugging Face or of Megatron.

    Args:
        directory: its path; for a Megatron checkpoint that of the iteration.
        sizes: of the model.
        said: corrections of its `config.json`.
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


@dataclass(frozen=True)
class MegatronNeo:
    """A NEO in Megatron's form whose tensors fit its sizes.

    Args:
        source: the checkpoint.
        sizes: of the model.
        shapes: Megatron names -> shapes of the model's tensors that are in the checkpoint.
        missing: names of those that are not, as ``allow_missing`` permits.
    """

    source: TorchDistDirectory
    sizes: NeoSizes
    shapes: dict[str, Shape]
    missing: list[str]


def open_megatron(directory: str | Path, allow_missing: Sequence[str] = ()) -> MegatronNeo:
    """Reads the metadata of a Megatron checkpoint and compares its tensors with the table.

    Args:
        directory: what `--save` filled, or one iteration of it.
        allow_missing: patterns of Megatron names that may be missing.

    Raises:
        CheckpointError: not a NEO in Megatron's form; a tensor is missing, unexpected or of another shape.
    """
    source = TorchDistDirectory(directory)
    sizes = saved_sizes(source)
    found = {key: shape for key, shape in source.shapes.items() if key.startswith(_MODEL_PREFIXES)}
    if not found:
        raise CheckpointError(f"{source.directory}: no tensor of a NEO in it: give a checkpoint saved by pretrain_neo")
    expected = {row.megatron: row.megatron_shape for row in tensor_table(sizes)}
    return MegatronNeo(source, sizes, found, check_shapes(found, expected, str(source.directory), allow_missing))


def saved_sizes(source: TorchDistDirectory) -> NeoSizes:
    """The sizes that a run or a conversion wrote into a Megatron checkpoint.

    Raises:
        CheckpointError: there are none, or not those of a NEO, or impossible ones.
    """
    sizes = getattr(source.common_state().get("args"), "neo_sizes", None)
    if not isinstance(sizes, dict):
        raise CheckpointError(
            f"{source.directory}: says nothing of NEO's sizes: give a checkpoint saved by pretrain_neo"
        )
    sizes = completed_sizes(sizes)
    if other := sizes.keys() ^ {field.name for field in fields(NeoSizes)}:
        names = ", ".join(sorted(map(str, other)))
        raise CheckpointError(
            f"{source.directory}: its sizes and ours differ in {names}: use the version that saved it"
        )
    try:
        return NeoSizes(**sizes)
    except ConfigError as error:
        raise CheckpointError(f"{source.directory}: {error}") from error


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
    return _either_from_megatron(directory) if is_megatron(directory) else _either_from_hf(directory, allow_pickle)


def _either_from_hf(directory: Path, allow_pickle: bool) -> EitherForm:
    neo = open_neo(directory, allow_pickle)
    names = [name for row in tensor_table(neo.sizes) for name in row.hf]
    stored = [StoredTensor(name, neo.source.shapes[name], neo.source.dtype(name)) for name in names]
    return EitherForm(directory, neo.sizes, neo.said, stored, {}, 0, lambda names: map(neo.source.read, names))


def _either_from_megatron(directory: Path) -> EitherForm:
    neo = open_megatron(directory)
    source, sizes, rows = neo.source, neo.sizes, tensor_table(neo.sizes)
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
        math.prod(shape) * source.dtype(key).itemsize for key, shape in source.shapes.items() if key not in neo.shapes
    )
    return EitherForm(source.directory, sizes, [], stored, source.common_state(), further, read)
