"""Megatron's torch_dist checkpoints as named tensors: written one at a time, read without trusting their pickles.

The format is that of `torch.distributed.checkpoint` (DCP): `.metadata` says which file holds which piece of a tensor.
Megatron adds `metadata.json`, by which it knows the format, and one entry of bytes, `common_state`, with everything
that is not a tensor. Neither a process group nor a GPU is needed.
"""

import argparse
import io
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from neo_megatron.checked_files import read_file, read_json
from neo_megatron.checked_pickles import load_allowed
from neo_megatron.checkpoint.dcp_metadata import read_metadata
from neo_megatron.checkpoint.hf_directory import DTYPE_NAMES, write_json
from neo_megatron.checkpoint.streaming import BlockWriter, FileWindow, StoredTensor, read_into
from neo_megatron.errors import CheckpointError
from neo_megatron.paths import Wanted, check_path

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_TRACKER_BYTES = 4096
_COMMON_BYTES = 256 << 20  # arguments and schedules, some kilobytes
COMMON_STATE = "common_state/shard_0_1"  # Megatron's name of piece 0 of 1


class _StreamedWriter(dcp.FileSystemWriter):
    """Writes each tensor as it arrives and keeps none; DCP's own writer keeps all until the file is closed."""

    def __init__(self, directory: Path, tensors: Sequence[StoredTensor], values: Iterable[Tensor]) -> None:
        super().__init__(directory)
        self._directory, self._tensors, self._values = directory, tensors, values

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        items = {item.index.fqn: item for item in plan.items}
        results = []
        with (self._directory / name).open("wb") as file:

            def wrote(item: WriteItem, begin: int) -> None:
                length = file.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))

            common_state = items.pop(COMMON_STATE)
            file.write(planner.resolve_data(common_state).getbuffer())
            wrote(common_state, 0)
            for stored, value in zip(self._tensors, self._values, strict=True):
                begin = file.tell()
                _save(value, file)
                wrote(items.pop(stored.name), begin)
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _save(value: Tensor, file: BinaryIO) -> None:
    try:
        torch.save(value, BlockWriter(file))
    except RuntimeError as error:
        # torch reports a position in the file, not that the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_torch_dist(
    directory: Path, stored: Sequence[StoredTensor], values: Iterable[Tensor], common_state: dict[str, Any]
) -> None:
    """Writes a checkpoint that `megatron.training` loads, into an existing empty directory.

    Values are requested one after the other and not kept.

    Args:
        stored: what comes, in order.
        values: the tensors themselves, in the same order, each with a storage of its own size.
        common_state: what is not a tensor: ``args``, ``iteration``, ``checkpoint_version``.
    """
    state: dict[str, Any] = {
        tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in stored
    }
    state[COMMON_STATE] = [common_state]  # Megatron stores a list of the pieces that one rank held
    with warnings.catch_warnings():
        # DCP warns that it works on one process, as intended.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = DefaultSavePlanner(flatten_state_dict=False)
        try:
            dcp.save(state, storage_writer=_StreamedWriter(directory, stored, values), planner=planner, no_dist=True)
        except CheckpointException as error:
            raise error.failures[0][0] from None  # the cause, instead of the rank
    write_json(directory / "metadata.json", FORMAT)


def tracked(tracker: Path) -> int | str | None:
    """The content of a tracker file: an iteration or "release"; `None` if it is neither, such as a half-written one.

    Raises:
        CheckpointError: not a file.
    """
    text = read_file(tracker, _TRACKER_BYTES).decode("ascii", "replace").strip()
    if text == "release":
        return text
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


class TorchDistDirectory:
    """The tensors and the common state of one saved iteration.

    Args:
        path: a directory that `--save` filled (its tracker names the iteration) or one iteration of it.

    Raises:
        CheckpointError: no torch_dist checkpoint there, or one that holds more than a checkpoint may.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = _iteration_directory(Path(path))
        if read_json(self.directory / "metadata.json").get("sharded_backend") != FORMAT["sharded_backend"]:
            raise CheckpointError(f"{self.directory}: not in torch_dist format: save it with --ckpt-format torch_dist")
        metadata = read_metadata(self.directory)
        self._entries, self._places = metadata.state_dict_metadata, metadata.storage_data
        self.shapes = {
            key: tuple(entry.size) for key, entry in self._entries.items() if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of an entry. Raises CheckpointError for one that NEO's weights never have."""
        dtype = self._entries[key].properties.dtype
        if dtype not in DTYPE_NAMES and not key.startswith("optimizer."):
            known = ", ".join(map(str, DTYPE_NAMES))
            raise CheckpointError(
                f"{self.directory / '.metadata'}: {key} is of {dtype}, not {known}: copy the checkpoint again"
            )
        return dtype

    def read(self, key: str) -> Tensor:
        """One complete tensor, put together from the pieces that any number of ranks saved.

        Call it only for keys whose shape was checked: this takes the memory that the shape asks for.
        """
        tensor = torch.empty(self.shapes[key], dtype=self.dtype(key))
        self.read_into(key, tensor)
        return tensor

    def read_into(self, key: str, view: Tensor) -> None:
        """Reads a tensor into memory of its shape, of any strides and type, and compares it with its checksums.

        Raises:
            CheckpointError: pieces of it are missing or damaged.
        """
        entry = self._entries[key]
        for piece in entry.chunks:
            part = view
            for dim, (begin, length) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                part = part.narrow(dim, begin, length)
            with self._opened(key, piece.offsets) as archive:
                _read_archive(archive, part, entry.properties.dtype)

    def common_state(self) -> dict[str, Any]:
        """Everything that is not a tensor. Only the classes that Megatron itself allows are unpickled.

        Raises:
            CheckpointError: there is none; it is damaged, or holds something else.
        """
        if not isinstance(self._entries.get(COMMON_STATE), BytesStorageMetadata):
            raise CheckpointError(f"{self.directory}: has no common state: save it with megatron-core 0.19")
        with self._opened(COMMON_STATE) as archive:
            state = io.BytesIO(archive.read(_COMMON_BYTES + 1))
            if state.getbuffer().nbytes > _COMMON_BYTES:
                raise CheckpointError(f"more than {_COMMON_BYTES:,} bytes: copy the checkpoint again")
            _plain_records(state)
            if damaged := zipfile.ZipFile(state).testzip():
                raise CheckpointError(f"the checksum of {damaged} differs: copy the checkpoint again")
        state.seek(0)
        try:
            loaded = load_allowed(state)
        except Exception as error:  # damaged bytes can make a pickle raise anything
            what = str(error).split("\n")[0]
            raise CheckpointError(
                f"{self.directory}: its arguments hold more than Megatron allows ({what}): not loaded"
            ) from error
        common = loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else None
        if not isinstance(common, dict) or not isinstance(common.get("args"), argparse.Namespace | None):
            raise CheckpointError(f"{self.directory}: its common state is of another kind: copy the checkpoint again")
        return common

    @contextmanager
    def _opened(self, key: str, offsets: torch.Size | None = None) -> Iterator[FileWindow]:
        """Opens the archive of one piece or object; errors name its file."""
        place = self._places.get(MetadataIndex(key, offsets))
        if place is None:
            raise CheckpointError(f"{self.directory}: the position of {key} is missing: the save was incomplete")
        path = self.directory / place.relative_path
        with path.open("rb", buffering=0) as file:
            try:
                yield FileWindow(file, place.offset, place.length)
            except (ValueError, RuntimeError, zipfile.BadZipFile) as error:
                what = str(error).split("\n")[0]
                raise CheckpointError(f"{path}: {key}: {what}") from error


def _plain_records(archive: Any) -> None:
    """Refuses what torch.save never writes: compressed records may be a thousand times as large as the file."""
    with zipfile.ZipFile(archive) as records:
        for record in records.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise CheckpointError(f"{record.filename} is compressed: copy the checkpoint again")
    archive.seek(0)


def _read_archive(archive: FileWindow, view: Tensor, dtype: torch.dtype) -> None:
    """Reads what `torch.save` wrote of one tensor, a zip of its values and a pickle that says how they lie.

    Raises:
        CheckpointError: it is another tensor than is wanted, or not stored in one piece.
        zipfile.BadZipFile: its bytes are not those of its checksum.
    """
    try:
        _plain_records(archive)
        stored = torch.load(archive, map_location="meta", weights_only=True)
    except Exception as error:  # damaged bytes can make a pickle raise anything
        raise CheckpointError(f"is not a readable tensor ({error}): copy the checkpoint again") from error
    if not isinstance(stored, Tensor):
        raise CheckpointError(f"is not a tensor but a {type(stored).__name__}: copy the checkpoint again")
    if (stored.shape, stored.dtype) != (view.shape, dtype):
        raise CheckpointError(f"holds {stored.dtype} {list(stored.shape)} instead of {dtype} {list(view.shape)}")
    if not stored.is_contiguous() or stored.storage_offset() or stored.untyped_storage().nbytes() != stored.nbytes:
        raise CheckpointError("is not stored as a tensor of its own: save it again")
    with zipfile.ZipFile(archive) as records:
        (values,) = (record for record in records.infolist() if record.filename.endswith("/data/0"))
        if values.file_size != stored.nbytes:
            raise CheckpointError(f"holds {values.file_size} bytes of values instead of {stored.nbytes}")
        with records.open(values) as file:
            read_into(view, file, dtype)  # type: ignore[arg-type]


def _iteration_directory(path: Path) -> Path:
    if os.path.lexists(path / "metadata.json"):
        return path
    tracker = path / TRACKER
    check_path(path, Wanted.MEGATRON)
    if not os.path.lexists(tracker):
        raise CheckpointError(
            f"{path}: neither {TRACKER} nor metadata.json in it: give a directory that --save has filled"
        )
    if (named := tracked(tracker)) is None:
        raise CheckpointError(f"{tracker}: does not name an iteration: write the number of a saved iteration into it")
    directory = path / (named if isinstance(named, str) else f"iter_{named:07d}")
    if not directory.is_dir():
        raise CheckpointError(
            f"{tracker}: its iteration {directory.name} is missing: write the number of a saved one into it"
        )
    return directory
