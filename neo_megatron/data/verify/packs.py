"""Verifies a directory of packs: its files, and that every sample is where it belongs and no pack is too long.

Only indices are read. The data sets that were packed are identified by their manifests, and are verified separately.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.manifest_schema import PACK_ARRAYS
from neo_megatron.data.packs.held_out import Split
from neo_megatron.data.packs.index import PATTERNS, UNITS, check_patterns, read_arrays
from neo_megatron.data.rejects import reject_lines
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.data.shards.reader import Shard
from neo_megatron.data.verify.shard import Damage, check_file
from neo_megatron.errors import DamagedFile, DataError, damaged_file
from neo_megatron.storage.base import MANIFEST, Directory, join


@dataclass(frozen=True)
class _Table:
    """Units, indexed by their samples.

    Args:
        units: ``UNIT`` [U], by length ascending.
        order: int64 [U], their numbers in the order of their first samples.
        first: int64 [U], those first samples, ascending.
        lengths: int64 [L], the lengths that units have in the patterns, ascending.
        length_ends: int64 [L], the number of units of at most that length.
    """

    units: np.ndarray
    order: np.ndarray
    first: np.ndarray
    lengths: np.ndarray
    length_ends: np.ndarray

    def of_samples(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Units that begin at one of the samples, ``UNIT`` [u], and the length that the patterns give each."""
        places = self.order[slice(*np.searchsorted(self.first, [start, end]))]
        return self.units[places], self.lengths[np.searchsorted(self.length_ends, places, side="right")]


def check_packs(directory: Directory, manifest: dict[str, Any], report: Callable[[int], Any]) -> list[Damage]:
    """All damage of a directory of packs.

    Args:
        directory: of the packs.
        manifest: of the packs.
        report: is called with the number of bytes that were checked; those of the units count twice.
    """
    damage: list[Damage] = []
    for name, file in manifest["files"].items():
        damage += check_file(directory, name, file, report)
    damaged = {entry.file for entry in damage}
    counts = manifest["counts"]
    if REJECTS not in damaged:
        entries = list(map(bool, reject_lines(directory)))
        if not all(entries):
            damage.append(Damage(REJECTS, f"line {entries.index(False) + 1} is not an entry of a rejected sample"))
        if len(entries) != counts["samples_rejected"]:
            damage.append(
                _of_manifest(f"it counts {counts['samples_rejected']:,} rejected samples, not {len(entries):,}")
            )
    for key, field in (("samples_packed", "samples"), ("tokens", "tokens")):
        total = sum(entry[field] for entry in manifest["data"])
        if counts[key] != total:
            damage.append(_of_manifest(f"it counts {counts[key]:,} {key}, but the parts add up to {total:,}"))
    fill = counts["tokens"] / (counts["packs"] * manifest["seq_length"])
    if not math.isclose(manifest["fill"], fill, rel_tol=1e-9):
        damage.append(_of_manifest(f"its fill is {manifest['fill']}, but its counts give {fill}"))
    try:
        mixture = Mixture([join(directory.location, entry["shards"]) for entry in manifest["data"]])
    except DataError as error:
        return [*damage, Damage(MANIFEST, f"the packed data sets cannot be opened: {error}")]
    others = [
        _of_manifest(f"the data set at {shards.location} is not the one that was packed")
        for shards, entry in zip(mixture.sets, manifest["data"], strict=True)
        if shards.fingerprint != entry["sha256"]
    ]
    damage += others
    if not others and counts["samples_read"] != len(mixture):
        damage.append(_of_manifest(f"it counts {counts['samples_read']:,} samples_read, not {len(mixture):,}"))
    if damaged & set(PACK_ARRAYS) or others:
        return damage
    try:
        table = _read_table(directory, manifest)
    except DamagedFile as wrong:
        return [*damage, Damage(wrong.path, wrong.what, "content")]
    return damage + list(_check_samples(table, mixture, manifest, report))


def _of_manifest(sentence: str) -> Damage:
    return Damage(MANIFEST, sentence, "changed")


def _read_table(directory: Directory, manifest: dict[str, Any]) -> _Table:
    """Reads the three arrays of an index.

    Raises:
        DamagedFile: they do not fit each other; its path is the name of the file.
    """
    units, patterns, runs = read_arrays(directory.location, manifest["files"])
    check_patterns(patterns, runs, len(units), "", manifest["seq_length"])
    packs = int(patterns["packs"].sum())
    if packs != manifest["counts"]["packs"]:
        raise damaged_file(PATTERNS, f"it has {packs} packs, not {manifest['counts']['packs']}", "pack again")
    lengths, run_of = np.unique(runs["length"], return_inverse=True)
    used = np.zeros(len(lengths), np.int64)
    np.add.at(used, run_of, np.repeat(patterns["packs"], patterns["runs"]) * runs["count"])
    order = np.argsort(units["first"], kind="stable")
    return _Table(units, order, units["first"][order], lengths, np.cumsum(used))


def _check_samples(
    table: _Table, mixture: Mixture, manifest: dict[str, Any], report: Callable[[int], Any]
) -> Iterator[Damage]:
    """Compares the samples of each shard with the units that begin in it."""
    if not 0 <= table.first[0] <= table.first[-1] < len(mixture):
        yield Damage(UNITS, "it has units of samples that no data set has", "content")
        return
    seen, is_held = 0, _is_held(mixture, manifest)
    side = is_held and _side(table, mixture, is_held)
    for shards, entry, start in zip(mixture.sets, manifest["data"], mixture.starts, strict=False):
        packed = tokens = 0
        for number, samples in enumerate(shards.entries.samples.tolist()):
            units, claimed = table.of_samples(start, start + samples)
            seen += len(units)
            report(units.nbytes)
            packed += int(units["samples"].sum(dtype=np.int64))
            tokens += int(claimed.sum())
            try:
                shard = shards.shard(number)
                belongs = is_held and is_held(shard) == side
                expected = _expected_times(shard, manifest, Fraction(entry["share"]), belongs)
                wrong = _check_shard(shard, units, claimed, start, *expected)
            except DataError as error:
                yield Damage(entry["shards"], str(error))
            else:
                for sample, sentence in wrong:
                    file, record = mixture.describe(sample)
                    yield Damage(UNITS, f"sample {sample} ({file}, record {record}): {sentence}", "content")
            start += samples
        if (packed, tokens) != (entry["samples"], entry["tokens"]):
            yield _of_manifest(
                f"it counts {entry['samples']:,} samples and {entry['tokens']:,} tokens of {entry['shards']}, but "
                f"{packed:,} and {tokens:,} are packed"
            )
    if seen != len(table.units):
        yield Damage(UNITS, f"it has {len(table.units) - seen} units of samples that no data set has", "content")


def _check_shard(
    shard: Shard, units: np.ndarray, claimed: np.ndarray, start: int, least: np.ndarray, most: np.ndarray
) -> list[tuple[int, str]]:
    """(sample, what is wrong), at most one for each kind of mistake, as one mistake may affect all samples."""
    shard.check_text()
    lengths = np.asarray(shard.tokens.lengths, np.int64)
    first, last = units["first"] - start, units["first"] - start + units["samples"]
    beyond = np.flatnonzero((units["samples"] < 1) | (last > len(lengths)))
    if len(beyond):
        return [(start + int(first[beyond[0]]), "its unit does not end in its shard")]
    found = []
    for values, said, what in (
        (lengths, claimed, "tokens"),
        (shard.image_tokens, units["cells"], "image tokens"),
        (lengths**2, units["squares"], "squared tokens"),
    ):
        ends = np.concatenate([[0], np.cumsum(values)])
        actual = ends[last] - ends[first]
        for wrong in np.flatnonzero(actual != said)[:1].tolist():
            found.append((start + int(first[wrong]), f"its unit has {actual[wrong]} {what}, not {said[wrong]}"))
    steps = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    times = np.cumsum(steps[:-1])
    for sample in np.flatnonzero((times < least) | (times > most))[:1].tolist():
        expected = f"{least[sample]}" if least[sample] == most[sample] else f"{least[sample]} or {most[sample]}"
        found.append((start + sample, f"it is in {times[sample]} packs of an epoch, not in {expected}"))
    return found


def _is_held(mixture: Mixture, manifest: dict[str, Any]) -> Callable[[Shard], np.ndarray] | None:
    """A function of a shard: whether each sample is held out, bool [samples]; ``None`` without held-out records."""
    if not manifest["held_out"]:
        return None
    share = Fraction(manifest["held_out"])
    if manifest["version"] == 2:  # by a hash of the names of a record's images
        return lambda shard: shard.samples["key"] < np.uint64(int(share * 2**64))
    return Split(mixture.sets, share, manifest["split"]["by"]).held_samples


def _side(table: _Table, mixture: Mixture, is_held: Callable[[Shard], np.ndarray]) -> bool:
    """Whether the packs are the held-out part, which the manifest does not say, but the first sample tells."""
    number = bisect_right(mixture.starts, int(table.first[0])) - 1
    shard, local = mixture.sets[number].locate(int(table.first[0]) - mixture.starts[number])
    return bool(is_held(shard)[local])


def _expected_times(
    shard: Shard, manifest: dict[str, Any], share: Fraction, belongs: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum number of times that each sample is in the packs of an epoch: int64 [samples] each."""
    fits = (np.asarray(shard.tokens.lengths) <= manifest["seq_length"]).astype(np.int64)
    if belongs is not None:
        fits *= belongs
    return fits * math.floor(share), fits * math.ceil(share)
