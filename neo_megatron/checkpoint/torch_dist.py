"""Megatron's torch_dist checkpoints as named tensors: written one at a time, read without trusting their pickles.

The format is that of `torch.distributed.checkpoint` (DCP): `.metadata` says which file holds which piece of a tensor.
Megatron adds `metadata.json`, by which it knows the format, and one entry of bytes, `common_state`, with all that is no
tensor. Neither a process group nor a GPU is needed.
"""

import argparse
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from neo_megatron.checkpoint.hf_directory import read_json, write_json

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"  # Megatron's name of piece 0 of 1


class _StreamedSave(DefaultSavePlanner):
    """Asks for each tensor when its turn to be written comes, so that one of them is in memory and not all."""

    def __init__(self, value_of: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.value_of = value_of

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.index.fqn == COMMON_STATE:
            return super().resolve_data(write_item)
        return self.value_of(write_item.index.fqn).contiguous()


def write_torch_dist(
    directory: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    value_of: Callable[[str], Tensor],
    common_state: dict[str, Any],
) -> None:
    """Writes a checkpoint that `megatron.training` loads, into an existing empty directory.

    Args:
        tensors: key -> global shape and type.
        value_of: key -> the tensor; called once per key.
        common_state: what is no tensor: ``args``, ``iteration``, ``checkpoint_version``.
    """
    state: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in tensors.items()
    }
    state[COMMON_STATE] = [common_state]  # Megatron stores a list of the pieces that one rank held
    with _in_one_process():
        writer = dcp.FileSystemWriter(directory, thread_count=1)
        dcp.save(state, storage_writer=writer, planner=_StreamedSave(value_of), no_dist=True)
    write_json(directory / "metadata.json", FORMAT)


@contextmanager
def _in_one_process() -> Iterator[None]:
    """DCP warns that it works alone, which is what we want of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class TorchDistDirectory:
    """The tensors and the common state of one saved iteration.

    Args:
        path: a directory that `--save` filled (its tracker names the iteration) or one iteration of it.

    Raises:
        ValueError: no torch_dist checkpoint there, or one that holds more than a checkpoint may.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = _iteration_directory(Path(path))
        if read_json(self.directory / "metadata.json").get("sharded_backend") != FORMAT["sharded_backend"]:
            raise ValueError(f"{self.directory}: not in torch_dist format: save it with --ckpt-format torch_dist")
        self._reader = _Reader(self.directory)
        self._entries = self._reader.read_metadata().state_dict_metadata
        self.shapes = {
            key: tuple(entry.size) for key, entry in self._entries.items() if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].properties.dtype

    def read(self, key: str) -> Tensor:
        """One whole tensor, put together from however many ranks saved pieces of it.

        Call it only for keys whose shape was checked: this takes the memory that the shape asks for.
        """
        entry = self._entries[key]
        # DCP would leave what no piece covers as it was: memory of whatever was there before.
        if sum(math.prod(piece.sizes) for piece in entry.chunks) != math.prod(entry.size):
            raise ValueError(
                f"{self.directory}: the pieces of {key} do not make up the tensor: the save was incomplete"
            )
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._load({key: tensor})
        return tensor

    def common_state(self) -> dict[str, Any]:
        """What is no tensor. Only the classes that Megatron itself allows are unpickled."""
        if not isinstance(self._entries.get(COMMON_STATE), BytesStorageMetadata):
            raise ValueError(f"{self.directory}: has no common state: save it with megatron-core 0.19")
        state = {COMMON_STATE: io.BytesIO()}
        self._load(state)
        with warnings.catch_warnings():
            # Here, as it takes seconds; it warns of optional packages, none of which a conversion uses.
            warnings.simplefilter("ignore")
            from megatron.core.safe_globals import SAFE_GLOBALS
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *SAFE_GLOBALS]):
                return torch.load(state[COMMON_STATE], weights_only=True)[0]
        except pickle.UnpicklingError as error:
            what = str(error).splitlines()[0]
            raise ValueError(
                f"{self.directory}: its arguments hold more than Megatron allows ({what}): not loaded"
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        planner = _RawBytesLoad(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _in_one_process():
            dcp.load(state, storage_reader=self._reader, planner=planner, no_dist=True)


class _RawBytesLoad(DefaultLoadPlanner):
    """Hands bytes over as they are; the default planner would unpickle them without an allow-list of ours."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata`, which is a pickle, with nothing but DCP's own records allowed, and once."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
        return self._metadata


def read_metadata(directory: Path) -> Metadata:
    """What `.metadata` says: which file of the directory holds which piece of which tensor.

    Raises:
        ValueError: it is missing, broken, holds more than DCP's records, or names a file that is not there.
    """
    path = directory / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path}: no such file: the save was interrupted, use an earlier iteration")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        names = {place.relative_path for place in metadata.storage_data.values()}
    except Exception as error:  # damaged bytes can make a pickle raise anything
        raise ValueError(f"{path}: not the metadata of a checkpoint ({error}): copy it again") from error
    _check_file_names(path, names)
    return metadata


def _check_file_names(path: Path, names: Iterable[str]) -> None:
    for name in set(names):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{path}: names {name!r}, which is no file of this directory: copy the checkpoint again")


class _MetadataUnpickler(pickle.Unpickler):
    """A pickle can call anything; this one can build the records that DCP writes and nothing else."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"}
        | {str(kind).removeprefix("torch.") for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
        "collections": {"OrderedDict", "defaultdict"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)


def _iteration_directory(path: Path) -> Path:
    if (path / "metadata.json").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{path}: neither {TRACKER} nor metadata.json in it: give a directory that --save has filled")
    iteration = tracker.read_text().strip()
    if iteration != "release" and not (iteration.isascii() and iteration.isdigit()):
        raise ValueError(f"{tracker}: {iteration!r} is no iteration: write the number of a saved iteration into it")
    directory = path / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")
    if not directory.is_dir():
        raise ValueError(
            f"{tracker}: its iteration {directory.name} is missing: write the number of a saved one into it"
        )
    return directory
