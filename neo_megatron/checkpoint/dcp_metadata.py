"""Reads and checks `.metadata` of a torch_dist checkpoint, and its checksums.

It is a pickle, so it is read by an unpickler that builds DCP's records alone. No checksum of torch's covers it, so
`checksums.json` does: it is written once a save is final. Checkpoints of other programs have none.
"""

import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from neo_megatron.checked_files import check_file, read_file, read_json
from neo_megatron.errors import CheckpointError

CHECKSUMS = "checksums.json"
AGAIN = ": copy the checkpoint again"  # remedy at the end of messages
_COVERED = (".metadata", "metadata.json")
_METADATA_BYTES = 1 << 30  # some kilobytes for each tensor and rank
_LARGEST = 1 << 60  # of a count that is stored as int64


def read_metadata(directory: Path) -> Metadata:
    """Reads which file of the directory holds which piece of which tensor.

    Raises:
        CheckpointError: it is missing, not as it was written, holds more than DCP's records, or names a file that is
            not there.
    """
    if os.path.lexists(directory / "common.pt"):
        raise CheckpointError(
            f"{directory / 'common.pt'}: written by megatron-core before 0.19: load and save the checkpoint with 0.19"
        )
    if os.path.lexists(directory / CHECKSUMS):
        _compare_checksums(directory)
    path = directory / ".metadata"
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file: the save was interrupted, use an earlier iteration")
    pickled = read_file(path, _METADATA_BYTES)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(pickled)).load()
        ends = _checked_ends(metadata)
    except Exception as error:  # damaged bytes can make a pickle raise anything
        raise CheckpointError(f"{path}: not the metadata of a checkpoint ({error}){AGAIN}") from error
    for name, end in ends.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path}: names {name!r}, which is not a file of this directory{AGAIN}")
        if (size := check_file(directory / name)) < end:
            raise CheckpointError(f"{directory / name}: has {size} bytes instead of {end}{AGAIN}")
    return metadata


def _checked_ends(metadata: Metadata) -> dict[str, int]:
    """File -> end of its last piece; checks everything that a reader relies on."""
    missing: set[tuple[str, tuple[int, ...] | None]] = set()  # pieces whose position is not known yet
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise CheckpointError(f"an entry {key!r} of another kind")
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype) or not _are_counts(entry.size):
                raise CheckpointError(f"{key} has no type or no shape")
            for piece in entry.chunks:
                for numbers in (piece.offsets, piece.sizes):
                    if not _are_counts(numbers) or len(numbers) != len(entry.size):
                        raise CheckpointError(f"a piece of {key} has other dimensions")
            # Values that no piece covers would be uninitialised memory.
            if not pieces_make_up(entry.size, [(piece.offsets, piece.sizes) for piece in entry.chunks]):
                raise CheckpointError(f"the pieces of {key} do not make up the tensor")
            missing |= {(key, tuple(piece.offsets)) for piece in entry.chunks}
        else:
            missing.add((key, None))
    ends: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place.relative_path, str):
            raise CheckpointError("a piece has no position")
        piece = (index.fqn, None if index.offset is None else tuple(index.offset))
        if piece not in missing:
            raise CheckpointError(f"a position of {index.fqn}, which is not an entry")
        missing.remove(piece)
        if not _are_counts((place.offset, place.length)):
            raise CheckpointError(f"a piece of {index.fqn} has an invalid position")
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    if missing:
        raise CheckpointError(f"the position of {min(key for key, _ in missing)} is missing")
    return ends


def pieces_make_up(size: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether pieces, given as offsets and sizes, cover every value of a tensor exactly once."""
    inside = all(
        begin + length <= extent
        for offsets, sizes in pieces
        for begin, length, extent in zip(offsets, sizes, size, strict=True)
    )
    if not inside or sum(math.prod(sizes) for _, sizes in pieces) != math.prod(size):
        return False
    # As many values as the tensor has: then each is covered once unless two pieces overlap.
    filled = [(np.array(offsets), np.array(sizes)) for offsets, sizes in pieces if math.prod(sizes)]
    if len(filled) < 2:
        return True
    begins, lengths = (np.stack(numbers) for numbers in zip(*filled, strict=True))
    ends = begins + lengths
    if len(cut := np.flatnonzero((begins != begins[0]).any(axis=0) | (lengths != lengths[0]).any(axis=0))) == 1:
        order = np.argsort(begins[:, cut[0]])  # as tensor parallelism cuts; a check of all pairs takes long for many
        return bool((ends[order[:-1], cut[0]] <= begins[order[1:], cut[0]]).all())
    return all(not ((begins[:n] < ends[n]) & (begins[n] < ends[:n])).all(axis=1).any() for n in range(1, len(begins)))


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, (tuple, list)) and all(type(it) is int and 0 <= it < _LARGEST for it in numbers)


def write_checksums(directory: Path) -> None:
    """Writes checksums of a checkpoint's metadata files; called when the save is final."""
    sums = {name: _sha256(directory / name) for name in _COVERED}
    partial = directory / (CHECKSUMS + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"sha256": sums}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / CHECKSUMS)


def _compare_checksums(directory: Path) -> None:
    sums = read_json(directory / CHECKSUMS).get("sha256")
    if not isinstance(sums, dict) or set(sums) != set(_COVERED):
        raise CheckpointError(f"{directory / CHECKSUMS} is not as it was written{AGAIN}")
    for name in _COVERED:
        check_file(directory / name)
        if _sha256(directory / name) != sums[name]:
            raise CheckpointError(f"{directory / name} has another checksum than {CHECKSUMS} says{AGAIN}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles only the records that DCP writes; an ordinary unpickler could call anything."""

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
