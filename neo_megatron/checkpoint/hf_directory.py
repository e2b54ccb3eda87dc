"""Hugging Face directories: safetensors read one tensor at a time, and output that appears whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, in one ``model.safetensors`` or in shards with an index.

    Only headers are read here; :meth:`read` maps one tensor. Pickled weights (``*.bin``) are never opened.

    Raises:
        ValueError: no safetensors in it, a broken file or index, an index that points outside the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            with self._open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if name in self._file_of:
                        raise ValueError(f"{path}: tensor {name} is also in {self._file_of[name].name}: delete one")
                    self._file_of[name] = path
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with self._open(self._file_of[name]) as tensors:
            return tensors.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        with self._open(self._file_of[name]) as tensors:
            stored = tensors.get_slice(name).get_dtype()
        for dtype, dtype_name in DTYPE_NAMES.items():
            if dtype_name == stored:
                return dtype
        raise ValueError(
            f"{self._file_of[name]}: {name} is stored as {stored}: store it as one of {DTYPE_NAMES.values()}"
        )

    def shapes_with_tied_head(self, head: str, embedding: str, tied: bool) -> dict[str, tuple[int, ...]]:
        """All shapes; where the configuration ties them, without a head that repeats the embedding.

        Raises:
            ValueError: a tied head that differs from the embedding.
        """
        shapes = dict(self.shapes)
        if tied and head in shapes:
            same = shapes.pop(head) == shapes.get(embedding) and torch.equal(self.read(head), self.read(embedding))
            if not same:
                raise ValueError(
                    f"{self.directory}: {head} differs from {embedding}, yet config.json ties them: "
                    "set tie_word_embeddings to false there or delete the head"
                )
        return shapes

    def _files(self) -> list[Path]:
        single, index = self.directory / WEIGHTS, self.directory / INDEX
        if not index.exists():
            if not single.exists():
                raise ValueError(f"{self.directory}: neither {WEIGHTS} nor {INDEX} in it: give a directory with either")
            return [single]
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index}: no weight_map in it: download the index again")
        shards = sorted(set(names.values()))
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(
                    f"{index}: {shard!r} is no safetensors file of this directory: download the index again"
                )
            if not (self.directory / shard).exists():
                raise ValueError(f"{index}: its file {shard} is missing: download that file too")
        return [self.directory / shard for shard in shards]

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}): copy or download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one sentence that names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file: give a directory that holds it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object: copy or download it again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(directory: Path, stored: list[StoredTensor], values: Iterable[Tensor], shard_bytes: int) -> None:
    """Writes tensors into one file, or into several with an index when they exceed ``shard_bytes``.

    The headers follow from ``stored``, so one value is in memory at a time.

    Args:
        stored: what comes, in order.
        values: the tensors themselves, in the same order.
        shard_bytes: largest file, in bytes of values; a larger tensor gets a file of its own.
    """
    values = iter(values)
    shards = _shards(stored, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                value = next(values)
                if (tuple(value.shape), value.dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(f"{name}: {tensor.name} came as {value.dtype} {list(value.shape)}, not {tensor}")
                file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in stored)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(stored: list[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in stored:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _header(shard: list[StoredTensor]) -> bytes:
    """Length and JSON in front of a safetensors file, padded so that the values begin on a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in shard:
        offsets = [begin, begin + tensor.nbytes]
        entries[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def whole_directory(output: str | Path) -> Iterator[Path]:
    """Yields a directory beside ``output`` that becomes ``output`` when the block ends well.

    An interrupted run leaves ``OUTPUT.partial``, which no reader takes for a checkpoint and the next run replaces.

    Raises:
        ValueError: ``output`` exists and is not an empty directory.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already: give another --output or delete it")
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    for path in [*partial.rglob("*"), partial]:
        _to_disk(path)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    _to_disk(output.parent)


def _to_disk(path: Path) -> None:
    """A rename that reaches the disk before the bytes it names would show a whole directory of torn files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
