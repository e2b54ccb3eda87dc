"""The packs of a data set for one sequence length: indices into its shards, written once, read by the data set."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from neo_megatron.data.errors import DataError, Reason
from neo_megatron.data.files import (
    MANIFEST,
    REJECTS,
    WholeFile,
    finish_output,
    json_line,
    prepare_output,
    read_manifest,
    write_whole,
)
from neo_megatron.data.packing import pack
from neo_megatron.data.shards import ShardSet

FORMAT, VERSION = "neo-packs", 1
SAMPLES, OFFSETS = "samples.npy", "offsets.npy"


@dataclass(frozen=True)
class PackIndex:
    """Which samples each pack holds.

    Args:
        sequence_length: tokens of a pack, padding included.
        shards: the data set that the sample numbers count in.
        samples: int64 [n], global sample numbers, pack behind pack.
        offsets: int64 [packs + 1], where each pack begins in ``samples``.
    """

    sequence_length: int
    shards: ShardSet
    samples: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def open(cls, directory: str | Path) -> "PackIndex":
        directory = Path(directory)
        manifest = read_manifest(directory, FORMAT, VERSION)
        shards = ShardSet(directory / manifest["shards"])
        if _fingerprint(shards.directory) != manifest["shards_sha256"]:
            raise DataError(f"{shards.directory} is not the data set that {directory} was packed from; pack it again")
        samples = np.load(directory / SAMPLES, mmap_mode="r", allow_pickle=False)
        offsets = np.load(directory / OFFSETS, mmap_mode="r", allow_pickle=False)
        if offsets[-1] != len(samples) or len(offsets) - 1 != manifest["counts"]["packs"]:
            raise DataError(f"{directory} is damaged: its files do not fit each other; pack it again")
        return cls(manifest["seq_length"], shards, samples, offsets)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.samples[self.offsets[number] : self.offsets[number + 1]]


def write_packs(
    data: str | Path,
    output: str | Path,
    sequence_length: int,
    seed: int = 0,
    on_error: Literal["skip", "fail"] = "skip",
) -> dict[str, Any]:
    """Packs a directory of shards; returns the manifest.

    Raises:
        DataError: where nothing is left to pack; with ``on_error="fail"`` for the first over-long sample.
    """
    if sequence_length < 2:
        raise DataError(f"--seq-length must be at least 2, not {sequence_length}")
    output, shards = Path(output), ShardSet(data)
    lengths, records = shards.lengths_and_records()
    over_long = np.flatnonzero(lengths > sequence_length)
    if len(over_long) and on_error == "fail":
        file, record = shards.describe(int(over_long[0]))
        sentence = _over_long(int(lengths[over_long[0]]), sequence_length)
        raise DataError(
            f"{file}, record {record}: {sentence}; raise --seq-length, or leave it out with --on-error skip"
        )
    kept = np.flatnonzero(lengths <= sequence_length)
    if not len(kept):
        raise DataError(f"{data} holds no sample of at most {sequence_length} tokens; nothing can be packed")
    prepare_output(output, FORMAT)
    rejects = WholeFile(output / REJECTS)
    for sample in over_long.tolist():
        file, record = shards.describe(sample)
        reason = _over_long(int(lengths[sample]), sequence_length)
        entry = {"file": file, "record": record, "kind": Reason.OVER_LONG.value, "reason": reason}
        rejects.write(json_line(entry))
    rejects.commit()
    with tqdm(total=len(kept), unit=" samples", desc="pack", unit_scale=True) as bar:
        order, offsets = pack(lengths[kept], records[kept], sequence_length, seed)
        bar.update(len(kept))
    packs, tokens = len(offsets) - 1, int(lengths[kept].sum(dtype=np.int64))
    manifest = {
        "version": VERSION,
        "seq_length": sequence_length,
        "seed": seed,
        "shards": os.path.relpath(os.path.realpath(data), os.path.realpath(output)),
        "shards_sha256": _fingerprint(shards.directory),
        "counts": {
            "samples_read": len(lengths),
            "samples_packed": len(kept),
            "samples_rejected": len(over_long),
            "packs": packs,
            "tokens": tokens,
        },
        "fill": tokens / (packs * sequence_length),
        "files": {
            SAMPLES: _write_array(output / SAMPLES, kept[order]),
            OFFSETS: _write_array(output / OFFSETS, offsets),
        },
    }
    finish_output(output, FORMAT, manifest)
    return manifest


def _over_long(length: int, sequence_length: int) -> str:
    return f"the sample has {length} tokens, more than the {sequence_length} of a pack"


def _fingerprint(shards: Path) -> str:
    return hashlib.sha256((shards / MANIFEST).read_bytes()).hexdigest()


def _write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return write_whole(path, buffer.getbuffer())
