"""What `.metadata` says of a torch_dist checkpoint, believed as far as it was checked.

It is a pickle, so it is read by an unpickler that builds DCP's records alone. No checksum of torch's covers it, so
`checksums.json` does: it is written once a save is final. Checkpoints of other programs have none.
"""

import hashlib
import io
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from neo_megatron.checkpoint.hf_directory import read_json

CHECKSUMS = "checksums.json"
_COVERED = (".metadata", "metadata.json")


def read_metadata(directory: Path) -> Metadata:
    """Which file of the directory holds which piece of which tensor.

    Raises:
        ValueError: it is missing, not as it was written, holds more than DCP's records, or names a file that is not
            there.
    """
    if (directory / CHECKSUMS).exists():
        _compare_checksums(directory)
    path = directory / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path}: no such file: the save was interrupted, use an earlier iteration")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        names = _file_names(metadata)
    except Exception as error:  # damaged bytes can make a pickle raise anything
        raise ValueError(f"{path}: not the metadata of a checkpoint ({error}): copy it again") from error
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{path}: names {name!r}, which is no file of this directory: copy the checkpoint again")
    return metadata


def _file_names(metadata: Metadata) -> set[str]:
    """The files that hold the pieces, after a look at all that a conversion reads: what lacks is missed here."""
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            math.prod(entry.size) * entry.properties.dtype.itemsize
            for piece in entry.chunks:
                if any(len(numbers) != len(entry.size) for numbers in (piece.offsets, piece.sizes)):
                    raise ValueError(f"a piece of {key} has other dimensions")
    return {str(place.relative_path) for place in metadata.storage_data.values() if place.offset + place.length >= 0}


def write_checksums(directory: Path) -> None:
    """Notes the checksums of the files that say what a checkpoint holds; call it when the save is final."""
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
        raise ValueError(f"{directory / CHECKSUMS} is not as it was written: copy the checkpoint again")
    for name in _COVERED:
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing: copy the checkpoint again")
        if _sha256(directory / name) != sums[name]:
            raise ValueError(
                f"{directory / name} has another checksum than {CHECKSUMS} says: copy the checkpoint again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
