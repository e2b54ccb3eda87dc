"""Hugging Face directories: safetensors read one tensor at a time, and output that appears complete or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neo_megatron.checked_files import check_file, read_json
from neo_megatron.checkpoint.streaming import BLOCK_BYTES, StoredTensor, read_into, write_from
from neo_megatron.errors import CheckpointError
from neo_megatron.locks import lock
from neo_megatron.paths import output_place

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, in one ``model.safetensors`` or in shards with an index.

    Only headers are read here; values are read when they are asked for, never mapped. Pickled weights (``*.bin``) are
    never opened.

    Raises:
        CheckpointError: no safetensors in it, a broken file or index, an index that points outside the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, _Place] = {}
        self._listed: dict[str, str] = {}  # from an index: tensor -> file
        for path in self._files():
            for name, place in _places(path).items():
                if name in self._places:
                    raise CheckpointError(
                        f"{path}: tensor {name} is also in {self._places[name].path.name}: delete one"
                    )
                self._places[name] = place
                self.shapes[name] = place.shape
        for name, file in self._listed.items():
            if name not in self._places or self._places[name].path.name != file:
                raise CheckpointError(
                    f"{self.directory / file}: {name} is not in it, as {INDEX} says: download both again"
                )
        if not self.shapes:
            raise CheckpointError(f"{self.directory}: no tensors in its files: copy or download it again")

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor."""
        return self.dtype(max(self.shapes, key=lambda name: math.prod(self.shapes[name])))

    def dtype(self, name: str) -> torch.dtype:
        place = self._places[name]
        for dtype, dtype_name in DTYPE_NAMES.items():
            if dtype_name == place.dtype_name:
                return dtype
        known = ", ".join(DTYPE_NAMES.values())
        raise CheckpointError(f"{place.path}: {name} is stored as {place.dtype_name}: store it as one of {known}")

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtype(name))
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, view: Tensor) -> None:
        """Reads a tensor, or as much of its beginning as the view has values for, into any strides and type."""
        place = self._places[name]
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            try:
                read_into(view, file, self.dtype(name))
            except ValueError as error:
                raise CheckpointError(f"{place.path}: {name}: {error}") from error

    def shapes_with_tied_head(self, head: str, embedding: str, tied: bool) -> dict[str, tuple[int, ...]]:
        """All shapes; where the configuration ties them, without a head that repeats the embedding.

        Raises:
            CheckpointError: a tied head that differs from the embedding.
        """
        shapes = dict(self.shapes)
        if tied and head in shapes:
            same = shapes.pop(head) == shapes.get(embedding) and self.same_values(head, embedding)
            if not same:
                raise CheckpointError(
                    f"{self.directory}: {head} differs from {embedding}, yet config.json ties them: "
                    "set tie_word_embeddings to false there or delete the head"
                )
        return shapes

    def same_values(self, *names: str) -> bool:
        """Whether tensors have the same bytes."""
        blocks = [self._blocks(self._places[name]) for name in names]
        return all(one == other for one, other in zip_longest(*blocks))

    @staticmethod
    def _blocks(place: "_Place") -> Iterator[bytes]:
        with place.path.open("rb", buffering=0) as file:
            for begin in range(place.offset, place.offset + place.nbytes, BLOCK_BYTES):
                file.seek(begin)
                yield file.read(min(BLOCK_BYTES, place.offset + place.nbytes - begin))

    def _files(self) -> list[Path]:
        single, index = self.directory / WEIGHTS, self.directory / INDEX
        if os.path.lexists(single):  # before an index, as in transformers
            return [single]
        if not os.path.lexists(index):
            raise CheckpointError(
                f"{self.directory}: neither {WEIGHTS} nor {INDEX} in it: give a directory with either"
            )
        self._listed = read_index(index, ".safetensors")
        return [self.directory / name for name in sorted(set(self._listed.values()))]


class _Place(NamedTuple):
    """File, position, shape and dtype of a stored tensor."""

    path: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype_name: str


def _places(path: Path) -> dict[str, _Place]:
    """The header of a file, after safetensors itself has checked that it is valid and describes the entire file."""
    check_file(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:  # an empty file cannot be mapped
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}): copy or download it again"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Place(path, 8 + length + begin, end - begin, tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def read_index(index: Path, ending: str) -> dict[str, str]:
    """Tensor -> file of the directory, as an index of Hugging Face says.

    Raises:
        CheckpointError: not an index; it names a file of another kind or directory, or one that is not there.
    """
    contents = read_json(index)
    names = contents.get("weight_map")
    if not isinstance(names, dict) or not isinstance(contents.get("metadata", {}), dict):
        raise CheckpointError(f"{index}: no weight_map in it: download the index again")
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).name != name or not name.endswith(ending) or len(name) > 255:
            what = (
                "safetensors file of this directory" if ending == ".safetensors" else f"file of it ending in {ending}"
            )
            raise CheckpointError(f"{index}: {name!r} is not a {what}: download the index again")
        if not os.path.lexists(index.parent / name):
            raise CheckpointError(f"{index}: its file {name} is missing: download that file too")
    return {tensor: str(name) for tensor, name in names.items()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON as UTF-8 with sorted keys, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(directory: Path, stored: list[StoredTensor], values: Iterable[Tensor], shard_bytes: int) -> None:
    """Writes tensors into one file, or into several with an index when they exceed ``shard_bytes``.

    The headers follow from ``stored``, so one value is in memory at a time.

    Args:
        stored: what comes, in order.
        values: the tensors themselves, or views of other dimensions on as many values, in the same order.
        shard_bytes: largest file, in bytes of values; a larger tensor gets a file of its own.
    """
    values = iter(values)
    shards = _shards(stored, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                value = next(values)
                if (value.nbytes, value.dtype) != (tensor.nbytes, tensor.dtype):
                    raise CheckpointError(
                        f"{name}: {tensor.name} came as {value.dtype} {list(value.shape)}, not {tensor}"
                    )
                write_from(value, file)
    if next(values, None) is not None:
        raise CheckpointError(f"{directory}: more tensors came than {len(stored)}")
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
def output_directory(output: str | Path) -> Iterator[Path]:
    """Yields a directory next to ``output`` that becomes ``output`` when the block ends well.

    An interrupted run leaves ``OUTPUT.partial``, which no reader takes for a checkpoint and the next run replaces.

    Raises:
        CheckpointError: ``output`` exists and is not an empty directory, or is a link that leads nowhere.
        DataError: another run is writing to it.
    """
    output = output_place(output)
    _refuse_full(output)
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = lock(partial, output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _refuse_full(output)  # another run may just have ended
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _to_disk(path)
        if output.exists():
            output.rmdir()
        partial.rename(output)
        _to_disk(output.parent)
    except OSError as error:
        error.filename = error.filename or str(partial)  # the error of a failed write does not name the file
        raise
    finally:
        os.close(held)


def _refuse_full(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists already: give another --output or delete it")


def _to_disk(path: Path) -> None:
    """Flushes to disk: a rename that is written before the data would show a directory of torn files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
