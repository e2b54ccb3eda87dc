"""Mutations of what `.metadata` says of a torch_dist checkpoint, and of the pieces that it points at."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

COMMON = "common_state/shard_0_1"
HARMLESS = (".metadata: another type",)  # for readers that look at the tensor itself


class Runs:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def metadata_mutations() -> dict[str, Callable[[Path], None]]:
    """By what is done; each changes a release directory, and no reader of weights may accept the result."""
    return {f".metadata: {name}": _rewrite(change) for name, change in _CHANGES.items()} | {
        ".metadata that runs": lambda root: (root / ".metadata").write_bytes(pickle.dumps(Runs())),
        ".metadata of a list": lambda root: (root / ".metadata").write_bytes(pickle.dumps([1])),
        ".metadata of nothing": lambda root: (root / ".metadata").write_bytes(pickle.dumps(None)),
        "common state that runs": lambda root: _common(root, [{"args": Runs()}]),
        "common state of a number": lambda root: _common(root, 3),
        "common state without arguments": lambda root: _common(root, [{}]),
        "common state with other arguments": lambda root: _common(root, [{"args": 3}]),
        "common.pt": lambda root: torch.save({"args": None}, root / "common.pt"),
    }


def _rewrite(change: Callable[[Metadata], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        metadata = FileSystemReader(root).read_metadata()
        change(metadata)
        (root / ".metadata").write_bytes(pickle.dumps(metadata))

    return apply


def _common(root: Path, value: Any) -> None:
    """A common state of other contents, in a file of its own."""
    torch.save(value, root / "other.distcp")
    size = (root / "other.distcp").stat().st_size
    _rewrite(lambda it: _place(it, COMMON, relative_path="other.distcp", offset=0, length=size))(root)


def _tensor(metadata: Metadata) -> str:
    return next(key for key, it in metadata.state_dict_metadata.items() if isinstance(it, TensorStorageMetadata))


def _place(metadata: Metadata, key: str, **changes: Any) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == key:
            metadata.storage_data[index] = dataclasses.replace(place, **changes)


def _at(**changes: Any) -> Callable[[Metadata], None]:
    return lambda metadata: _place(metadata, _tensor(metadata), **changes)


def _entry(**changes: Any) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        key = _tensor(metadata)
        metadata.state_dict_metadata[key] = dataclasses.replace(metadata.state_dict_metadata[key], **changes)

    return apply


def _chunks(*numbers: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Metadata], None]:
    return _entry(chunks=[ChunkStorageMetadata(torch.Size(begin), torch.Size(size)) for begin, size in numbers])


def _swap(metadata: Metadata) -> None:
    one, other, *_ = (index for index in metadata.storage_data if index.fqn != COMMON)
    places = metadata.storage_data
    places[one], places[other] = places[other], places[one]


def _dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[_tensor(metadata)].properties.dtype = torch.int8


_CHANGES: dict[str, Callable[[Metadata], Any]] = {
    "offset negative": _at(offset=-1),
    "offset huge": _at(offset=1 << 62),
    "offset beyond the file": _at(offset=1 << 40),
    "offset not a number": _at(offset="0"),
    "length negative": _at(length=-1),
    "length zero": _at(length=0),
    "length huge": _at(length=1 << 70),
    "length true": _at(length=True),
    "length short": _at(length=100),
    "path upwards": _at(relative_path="../__0_0.distcp"),
    "path absolute": _at(relative_path="/etc/passwd"),
    "path missing": _at(relative_path="__9_9.distcp"),
    "path not a string": _at(relative_path=3),
    "path of a million characters": _at(relative_path="x" * 1_000_000),
    "path with a zero": _at(relative_path="a\0b"),
    "path of the directory": _at(relative_path="."),
    "shape huge": _entry(size=torch.Size([1 << 40, 1 << 20])),
    "shape negative": _entry(size=[-1, 4]),
    "shape of words": _entry(size=["a"]),
    "no pieces": _entry(chunks=[]),
    "pieces that overlap": _chunks(((0, 0), (512, 64)), ((0, 0), (512, 64))),
    "pieces that leave a hole": _chunks(((0, 0), (512, 64))),
    "pieces of three dimensions": _chunks(((0, 0, 0), (1, 2, 3))),
    "a piece outside": _chunks(((1024, 0), (1024, 64))),
    "another type": _dtype,
    "two places swapped": _swap,
    "places lost": lambda metadata: metadata.storage_data.clear(),
    "tensors lost": lambda metadata: metadata.state_dict_metadata.pop(_tensor(metadata)),
    "a tensor that is an object": lambda it: it.state_dict_metadata.update({_tensor(it): BytesStorageMetadata()}),
    "an object that is a tensor": lambda it: it.state_dict_metadata.update(
        {COMMON: it.state_dict_metadata[_tensor(it)]}
    ),
    "an entry of a number": lambda it: it.state_dict_metadata.update({_tensor(it): 3}),
    "places that are a list": lambda it: setattr(it, "storage_data", [1]),
    "tensors that are nothing": lambda it: setattr(it, "state_dict_metadata", None),
}
