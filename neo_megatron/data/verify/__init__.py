"""Verifies a directory of shards or packs: every file, every count and every sample; all damage is listed."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.manifest import REJECTS, is_as_written, manifest_bytes, parse_manifest
from neo_megatron.data.manifest_schema import settings_of_sources
from neo_megatron.data.packs import index
from neo_megatron.data.rejects import reject_lines
from neo_megatron.data.shards import reader
from neo_megatron.data.verify.packs import check_packs
from neo_megatron.data.verify.pool import run_checks
from neo_megatron.data.verify.shard import Damage, DataSet, check_file, check_shard
from neo_megatron.paths import Wanted
from neo_megatron.storage.base import MANIFEST, Directory, is_remote
from neo_megatron.storage.open import open_directory

_LISTED = 100  # lines of the list of rejects that are not entries, one by one


@dataclass
class Verification:
    """The result of a verification.

    Args:
        damage: in the order of the manifest.
        notes: unexpected findings that are not damage.
        files, bytes, samples, images: how many were checked.
        proven: what the verification has shown if there is no damage.
    """

    damage: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    samples: int = 0
    images: int = 0
    proven: str = ""

    def remedy(self) -> str:
        """The remedy for the damage, for a message."""
        if any(damage.kind != "content" for damage in self.damage):
            return "copy the listed files again from where they were written, or write the data set again"
        return "the files are as they were written, so copying does not help; write the data set again"

    def summary(self) -> str:
        """How much was checked."""
        numbers = {"files": self.files, "bytes": self.bytes, "samples": self.samples}
        if self.images:
            numbers["images"] = self.images
        return ", ".join(f"{number:,} {unit}" for unit, number in numbers.items())


def verify(location: str | Path, workers: int = 1) -> Verification:
    """Verifies a directory of shards or of packs; the result does not depend on the number of workers.

    Args:
        location: a directory or an address of object storage.
        workers: processes.

    Raises:
        DataError: there is no complete data set, its manifest is not valid, or a worker was killed.
    """
    directory = open_directory(location)
    text = manifest_bytes(directory, Wanted.DATA_SET)
    try:
        packed = json.loads(text).get("format") == index.FORMAT
    except (ValueError, AttributeError, RecursionError):
        packed = False  # the error is raised below
    if packed:
        manifest = parse_manifest(text, directory.location, index.FORMAT, *index.READABLE)
        result = _verify_packs(directory, manifest)
    else:
        result = _verify_shards(
            directory, parse_manifest(text, directory.location, reader.FORMAT, *reader.READABLE), workers
        )
    if not is_as_written(text):
        result.damage.insert(0, Damage(MANIFEST, "its content does not match its own checksum", "changed"))
    return result


def _verify_shards(directory: Directory, manifest: dict[str, Any], workers: int) -> Verification:
    data = _data_set(directory, manifest)
    entries, counts = manifest["shards"], manifest["counts"]
    result = Verification(
        damage=_wrong_sums(counts, entries),
        files=2 + sum(len(entry["files"]) for entry in entries),
        bytes=sum(file["bytes"] for entry in entries for file in entry["files"].values()),
        samples=sum(entry["samples"] for entry in entries),
        images=sum(entry["pictures"] for entry in entries),
        proven="sizes, checksums and counts fit, every sample is well formed, and every image can be decoded",
    )
    rejects = manifest["files"][REJECTS]
    damage = list(check_file(directory, REJECTS, rejects, lambda _: None))
    result.damage += damage or _check_rejects(directory, counts["rejected_by_reason"])
    result.notes += _strays(directory, {REJECTS}.union(*(entry["files"] for entry in entries)))
    starts = accumulate((entry["samples"] for entry in entries), initial=0)
    tasks = ((data, entry, start) for entry, start in zip(entries, starts, strict=False))
    with tqdm(total=result.bytes, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
        for damage in run_checks(check_shard, tasks, workers, bar):
            result.damage += damage
    return result


def _verify_packs(directory: Directory, manifest: dict[str, Any]) -> Verification:
    files = manifest["files"]
    total = sum(file["bytes"] for file in files.values())
    work = total + files[index.UNITS]["bytes"]  # the units are then compared with the shards
    with tqdm(total=work, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
        damage = check_packs(directory, manifest, bar.update)
    return Verification(
        damage,
        notes=_strays(directory, set(files)),
        files=1 + len(files),
        bytes=total,
        samples=manifest["counts"]["samples_packed"],
        proven="sizes and checksums fit, every sample is where it belongs, and no pack is too long; "
        "verify the shards separately",
    )


def _data_set(directory: Directory, manifest: dict[str, Any]) -> DataSet:
    """The properties that all shards of a data set share."""
    return DataSet(
        location=directory.location,
        ids=SpecialIds(**manifest["tokenizer"]["ids"]),
        vocabulary=manifest["tokenizer"]["size"],
        image_store=manifest["settings"]["image_store"],
        settings=tuple(settings_of_sources(manifest)),
        annotations=tuple(source["annotations"] for source in manifest["sources"]),
    )


def _wrong_sums(counts: dict[str, Any], entries: Sequence[dict[str, Any]]) -> list[Damage]:
    sums = {
        "samples_read": counts["samples_kept"] + counts["samples_rejected"],
        "samples_kept": sum(entry["samples"] for entry in entries),
        "samples_rejected": sum(counts["rejected_by_reason"].values()),
        "pictures": sum(entry["pictures"] for entry in entries),
    }
    return [
        Damage(MANIFEST, f"it counts {counts[key]:,} {key}, but the parts add up to {total:,}", "changed")
        for key, total in sums.items()
        if counts[key] != total
    ]


def _check_rejects(directory: Directory, counted: dict[str, int]) -> Iterator[Damage]:
    """Compares the list of rejected samples with the manifest's counts for each reason."""
    listed: Counter[str] = Counter()
    wrong = 0
    for number, entry in enumerate(reject_lines(directory), start=1):
        if entry is not None:
            listed[entry["kind"]] += 1
            continue
        wrong += 1
        if wrong <= _LISTED:
            yield Damage(REJECTS, f"line {number} is not an entry of a rejected sample", "changed")
    if wrong > _LISTED:
        yield Damage(REJECTS, f"{wrong - _LISTED} more lines are not entries of rejected samples", "changed")
    for reason in sorted({*listed, *counted}):
        found, count = listed[reason], counted.get(reason, 0)
        if found != count:
            yield Damage(REJECTS, f"it lists {found:,} samples under {reason!r}, not {count:,}", "changed")


def _strays(directory: Directory, known: set[str]) -> list[str]:
    """Notes on files that are not in the manifest, which nothing reads; object storage is not listed."""
    if is_remote(directory.location):
        return []
    names = {path.name for path in Path(directory.location).iterdir()} - known - {MANIFEST}
    return [f"{name} is not in {MANIFEST}; nothing reads it" for name in sorted(names)]
