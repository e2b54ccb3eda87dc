"""Packs shards and writes the index of the packs: patterns, and units sorted by length, but no tokens."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from neo_megatron.atomic_files import AtomicFile, json_line
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.manifest_schema import MAX_SEQUENCE_LENGTH
from neo_megatron.data.packs.balance import balanced_order, imbalance
from neo_megatron.data.packs.best_fit import best_fit
from neo_megatron.data.packs.held_out import Split, SplitBy
from neo_megatron.data.packs.index import (
    FORMAT,
    PATTERN,
    PATTERNS,
    RUN,
    RUNS,
    UNIT,
    UNITS,
    VERSION,
    PackTable,
    open_table,
)
from neo_megatron.data.packs.origins import Origins
from neo_megatron.data.packs.outputs import NewOutputs
from neo_megatron.data.packs.units import Units, draw_share, units_of_shard
from neo_megatron.data.permutation import key_of
from neo_megatron.data.rejects import place_of
from neo_megatron.data.shards.arrays import header_of, write_array
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.storage.base import is_remote

_CHUNK = 1 << 20
# The manifest reports the balance of such batches as an example.
_RANKS, _PACKS_EACH, _BATCHES = 8, 4, 50


@dataclass(frozen=True)
class PackInput:
    """A data set to pack: its directory of shards, and how often on average an epoch uses a record of it."""

    shards: str
    share: Fraction = Fraction(1)


@dataclass(frozen=True)
class HeldOut:
    """A part that is packed separately.

    Args:
        share: of all records, approximately; each is used once. See `held_out.Split`.
        output: its directory.
        by: files are identified by their resolved path, or by their content.
    """

    share: Fraction
    output: str
    by: SplitBy = "path"


def write_packs(
    inputs: Sequence[PackInput],
    output: str | Path,
    sequence_length: int,
    seed: int = 0,
    on_error: Literal["skip", "fail"] = "skip",
    held_out: HeldOut | None = None,
) -> list[dict[str, Any]]:
    """Packs data sets together; returns the manifest, and that of the held-out part if there is one.

    Args:
        inputs: the data sets.
        output: a new directory.
        sequence_length: tokens of a pack.
        seed: of the draw from data sets of which only a share is used.
        on_error: "skip" lists over-long samples, "fail" stops at the first.
        held_out: the part to keep apart.

    Raises:
        DataError: a data set cannot be read, no samples are left to pack, or there is an over-long sample with
            ``on_error="fail"``.
    """
    if not 2 <= sequence_length <= MAX_SEQUENCE_LENGTH:
        raise DataError(f"--seq-length must be from 2 to {MAX_SEQUENCE_LENGTH}, not {sequence_length}")
    locations = [str(output)] + ([str(held_out.output)] if held_out else [])
    if held_out and _resolved(locations[0]) == _resolved(locations[1]):
        raise DataError(f"--held-out and --output both name {output}; give the held-out packs a directory of their own")
    data = Mixture([entry.shards for entry in inputs])
    sides = list(map(_Side, locations))
    split = Split(data.sets, held_out.share, held_out.by) if held_out else None
    over_long: list[tuple[int, int]] = []
    with tqdm(total=len(data), unit=" samples", desc="read lengths", unit_scale=True) as bar:
        for number, entry in enumerate(inputs):
            parts: tuple[list[Units], list[Units]] = ([], [])
            for units, held, too_long in _read(data, number, sequence_length, split):
                if too_long and on_error == "fail":
                    raise DataError(_stop(data, *too_long[0], sequence_length))
                over_long += too_long
                parts[0].append(units.take(~held) if split else units)
                parts[1].append(units.take(held))
                bar.update(int(units.samples.sum()) + len(too_long))
            sides[0].add(entry, data.sets[number], parts[0], seed)
            for side in sides[1:]:
                side.add(replace(entry, share=Fraction(1)), data.sets[number], parts[1], seed)
    for side in sides:
        if not any(len(part) for part in side.parts):
            raise DataError(
                f"{side.location} would be empty: no sample of at most {sequence_length} tokens is left to pack; "
                "raise --seq-length or the share"
            )
    common = {
        "version": VERSION,
        "seq_length": sequence_length,
        "seed": seed,
        "held_out": str(held_out.share) if held_out else None,
        "split": split.report() if split else None,
    }
    rejects = [over_long, []]
    with NewOutputs(locations, FORMAT) as outputs:
        manifests = [
            _write(side, directory, data, common, listed)
            for side, directory, listed in zip(sides, outputs.directories, rejects, strict=False)
        ]
        outputs.finish(manifests)
    return manifests


class _Side:
    """The contents of one output of packs: training or held-out."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.parts: list[Units] = []
        self.data: list[dict[str, Any]] = []
        self._due = Fraction(0)  # sum of the shares of the data sets so far, in units
        self._turns: Counter[str] = Counter()  # how often a data set was drawn from

    def add(self, entry: PackInput, shards: ShardSet, parts: list[Units], seed: int) -> None:
        """Adds the units of a data set, of which a share is drawn."""
        if entry.share != 1:
            together = Units.join(parts)
            # The draw does not depend on the other data sets, nor on the path; from a data set that is given twice,
            # two different draws are made.
            turn = self._turns[shards.text_fingerprint]
            self._turns[shards.text_fingerprint] += 1
            key = key_of(seed, shards.text_fingerprint, turn)
            parts = [together.take(draw_share(len(together), entry.share, key, self._due))]
            self._due += len(together) * entry.share
        self.parts += parts
        self.data.append(
            {
                "shards": _seen_from(self.location, entry.shards),
                "sha256": shards.fingerprint,
                "share": str(entry.share),
                "samples": sum(int(part.samples.sum(dtype=np.int64)) for part in parts),
                "tokens": sum(int(part.lengths.sum(dtype=np.int64)) for part in parts),
            }
        )


def _read(
    data: Mixture, number: int, capacity: int, split: Split | None
) -> Iterator[tuple[Units, np.ndarray, list[tuple[int, int]]]]:
    """For each shard of a data set: its units, whether each is held out, bool [U], and over-long (sample, length)."""
    shards, first = data.sets[number], data.starts[number]
    for shard in map(shards.shard, range(len(shards.entries))):
        lengths = shard.tokens.lengths
        units = units_of_shard(shard, first, capacity)
        held = np.zeros(len(units), bool)
        if split:
            held = split.held_samples(shard)[units.first - first]
        too_long = np.flatnonzero(lengths > capacity)
        yield units, held, list(zip((first + too_long).tolist(), lengths[too_long].tolist(), strict=True))
        first += len(lengths)


def _write(
    side: _Side, directory: Path, data: Mixture, common: dict[str, Any], over_long: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Writes the files of one output into a directory; returns the contents of its manifest."""
    length = common["seq_length"]
    rejects = AtomicFile(directory / REJECTS)
    origins = Origins(data)
    for sample, tokens in over_long:
        rejected = RejectedSample(Reason.OVER_LONG, _too_long(tokens, length))
        rejects.write(json_line(rejected.row(*origins.of(sample))))
    files = {REJECTS: rejects.commit()}
    units = Units.join(side.parts)
    side.parts.clear()  # they take as much memory as the joined units
    files |= write_table(directory, units, length)
    table = open_table(directory, files, length, len(data))
    tokens = sum(entry["tokens"] for entry in side.data)
    return {
        **common,
        "data": side.data,
        "counts": {
            "samples_read": len(data),
            "samples_packed": sum(entry["samples"] for entry in side.data),
            "samples_rejected": len(over_long),
            "packs": len(table),
            "tokens": tokens,
        },
        "fill": tokens / (len(table) * length),
        "imbalance": reported_imbalance(table),
        "files": files,
    }


def write_table(directory: Path, units: Units, capacity: int) -> dict[str, dict[str, Any]]:
    """Finds the patterns and writes the three arrays of an index; returns the entries of the files in a manifest."""
    patterns = best_fit(np.bincount(units.lengths, minlength=capacity + 1))
    runs = [run for pattern in patterns for run in pattern.runs]
    file = AtomicFile(directory / UNITS)
    file.write(header_of(UNIT, len(units)))
    with tqdm(total=len(units), unit=" units", desc="sort and write packs", unit_scale=True) as bar:
        # NumPy uses radix sort, which takes linear time, for 16-bit numbers.
        order = np.argsort(units.lengths.astype(np.uint16) if capacity < 1 << 16 else units.lengths, kind="stable")
        for start in range(0, len(units), _CHUNK):
            chosen = units.take(order[start : start + _CHUNK])
            rows = np.empty(len(chosen), UNIT)
            rows["first"], rows["samples"] = chosen.first, chosen.samples
            rows["cells"], rows["squares"] = chosen.image_tokens, chosen.squares
            file.write(rows)
            bar.update(len(rows))
    return {
        UNITS: file.commit(),
        PATTERNS: write_array(directory / PATTERNS, np.array([(p.packs, len(p.runs)) for p in patterns], PATTERN)),
        RUNS: write_array(directory / RUNS, np.array(runs, RUN)),
    }


def reported_imbalance(table: PackTable) -> dict[str, Any] | None:
    """Largest-to-mean work of example ranks, before and after balancing; ``None`` if there are too few packs."""
    packs = _RANKS * _PACKS_EACH
    batches = min(len(table) // packs, _BATCHES)
    if not batches:
        return None
    drawn, balanced = [], []
    for batch in range(batches):
        costs = table.costs(table.draw(0, 0, np.arange(batch * packs, (batch + 1) * packs)))
        drawn.append(imbalance(costs, _RANKS, 1))
        balanced.append(imbalance(costs[balanced_order(costs, _RANKS, 1)], _RANKS, 1))
    kinds = ("attention", "pictures")
    return {
        "ranks": _RANKS,
        "packs_per_rank": _PACKS_EACH,
        "drawn": dict(zip(kinds, np.mean(drawn, axis=0).round(4).tolist(), strict=True)),
        "balanced": dict(zip(kinds, np.mean(balanced, axis=0).round(4).tolist(), strict=True)),
    }


def _seen_from(packs: str, shards: str) -> str:
    """A relative path, which stays valid when both move together; an address unless both are in the same bucket.

    Raises:
        DataError: the packs are in object storage and the shards are not.
    """
    if not is_remote(packs):
        return shards if is_remote(shards) else os.path.relpath(os.path.realpath(shards), os.path.realpath(packs))
    if not is_remote(shards):
        raise DataError(
            f"the packs in {packs} need their shards in object storage: copy {shards} there and give its address, or "
            "pack into a local directory and upload both"
        )
    (scheme, here), (other, there) = (address.rstrip("/").split("://", 1) for address in (packs, shards))
    if (scheme, here.split("/")[0]) != (other, there.split("/")[0]):
        return shards
    return posixpath.relpath(there, here)


def _resolved(location: str) -> str:
    return location.rstrip("/") if is_remote(location) else os.path.realpath(location)


def _too_long(length: int, capacity: int) -> str:
    return f"the sample has {length} tokens, more than the {capacity} of a pack"


def _stop(data: Mixture, sample: int, length: int, capacity: int) -> str:
    remedy = "raise --seq-length, or leave it out with --on-error skip"
    return f"{place_of(*Origins(data).of(sample))}: {_too_long(length, capacity)}; {remedy}"
