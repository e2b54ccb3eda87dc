"""Proves a directory of shards or packs: every file, every count, every sample. Finds all damage, and names it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from neo_megatron.data import pack_index, shards
from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.errors import DataError
from neo_megatron.data.files import MANIFEST, REJECTS, is_as_written, manifest_bytes, parse_manifest
from neo_megatron.data.held_out import SplitBy
from neo_megatron.data.settings import ImageStore, Settings
from neo_megatron.data.storage import Directory, is_remote, join, open_directory
from neo_megatron.data.verify.packs import ARRAYS, check_packs
from neo_megatron.data.verify.pool import run_checks
from neo_megatron.data.verify.shard import Damage, DataSet, check_file, check_shard, expected_files
from neo_megatron.paths import Wanted


@dataclass
class Verification:
    """What was looked at, and what is wrong with it.

    Args:
        damage: in the order of the manifest.
        notes: what is no damage and yet unexpected.
        files, bytes, samples, pictures: how many were looked at.
        proven: what is true where there is no damage.
    """

    damage: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    samples: int = 0
    pictures: int = 0
    proven: str = ""

    def remedy(self) -> str:
        """What to do about the damage, as one sentence."""
        if any(damage.kind != "content" for damage in self.damage):
            return "copy the files that are named again from where they were written, or write the data set again"
        return "the files are as they were written, so copying does not help; write the data set again"

    def summary(self) -> str:
        """How much was looked at."""
        numbers = {"files": self.files, "bytes": self.bytes, "samples": self.samples}
        if self.pictures:
            numbers["pictures"] = self.pictures
        return ", ".join(f"{number:,} {unit}" for unit, number in numbers.items())


def verify(location: str | Path, workers: int = 1) -> Verification:
    """Proves a directory of shards, or one of packs; the same result for any number of workers.

    Raises:
        DataError: there is no complete data set, its manifest cannot be understood, or a worker was killed.
    """
    directory = open_directory(location)
    text = manifest_bytes(directory, Wanted.DATA_SET)
    try:
        packed = json.loads(text).get("format") == pack_index.FORMAT
    except (ValueError, AttributeError, RecursionError):
        packed = False  # what is wrong is said below
    if packed:
        manifest = parse_manifest(text, directory.location, pack_index.FORMAT, *pack_index.READABLE)
        result = _verify_packs(directory, manifest)
    else:
        result = _verify_shards(
            directory, parse_manifest(text, directory.location, shards.FORMAT, *shards.READABLE), workers
        )
    if not is_as_written(text):
        result.damage.insert(0, Damage(MANIFEST, "it does not fit its own checksum", "changed"))
    return result


def _verify_shards(directory: Directory, manifest: dict[str, Any], workers: int) -> Verification:
    data = _understood(directory, manifest, _data_set)
    entries, counts = manifest["shards"], manifest["counts"]
    result = Verification(
        damage=_wrong_sums(counts, entries),
        files=2 + sum(len(entry["files"]) for entry in entries),
        bytes=sum(file["bytes"] for entry in entries for file in entry["files"].values()),
        samples=sum(entry["samples"] for entry in entries),
        pictures=sum(entry["pictures"] for entry in entries),
        proven="sizes, checksums and counts fit, every sample is well formed, and every picture can be decoded",
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
    _understood(directory, manifest, _check_pack_manifest)
    files = manifest["files"]
    total = sum(file["bytes"] for file in files.values())
    work = total + files[pack_index.UNITS]["bytes"]  # the units are held against the shards afterwards
    with tqdm(total=work, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
        damage = check_packs(directory, manifest, bar.update)
    return Verification(
        damage,
        notes=_strays(directory, set(files)),
        files=1 + len(files),
        bytes=total,
        samples=manifest["counts"]["samples_packed"],
        proven="sizes and checksums fit, every sample is where it belongs, and no pack is over its length; "
        "the shards are to be proven by themselves",
    )


def _understood[T](directory: Directory, manifest: dict[str, Any], read: Callable[[Directory, dict[str, Any]], T]) -> T:
    """What ``read`` makes of a manifest; a form that is not ours is damage of the manifest itself."""
    try:
        return read(directory, manifest)
    except KeyError as error:
        raise DataError(f"{join(directory.location, MANIFEST)} is damaged: it lacks {error}; copy it again") from error
    except (TypeError, ValueError, AttributeError, DataError) as error:
        raise DataError(f"{join(directory.location, MANIFEST)} is damaged ({error}); copy it again") from error


def _data_set(directory: Directory, manifest: dict[str, Any]) -> DataSet:
    """What all shards have in common; the form of all that is relied on is checked."""
    ids = SpecialIds(**manifest["tokenizer"]["ids"])
    data = DataSet(
        location=directory.location,
        ids=ids,
        vocabulary=_natural(manifest["tokenizer"]["size"]),
        settings=Settings(**manifest["settings"]),
        annotations=tuple(str(source["annotations"]) for source in manifest["sources"]),
    )
    if data.settings.image_store not in get_args(ImageStore):
        raise ValueError(f"pictures cannot be stored as {data.settings.image_store!r}")
    if max(map(_natural, asdict(ids).values())) >= data.vocabulary:
        raise ValueError("an id lies outside the tokenizer")
    counts = manifest["counts"]
    for key in ("records_read", "samples_read", "samples_kept", "samples_rejected", "pictures"):
        _natural(counts[key])
    for count in counts["rejected_by_reason"].values():
        _natural(count)
    _check_files(manifest["files"], {REJECTS})
    for entry in manifest["shards"]:
        _natural(entry["samples"])
        _natural(entry["pictures"])
        if entry["name"] != shards.shard_name(int(entry["name"])):
            raise ValueError(f"{entry['name']!r} is no name of a shard")
        if manifest["version"] > 2:
            _natural(entry["media"])
        _check_files(entry["files"], expected_files(entry["name"], manifest["version"]))
    return data


def _check_pack_manifest(directory: Directory, manifest: dict[str, Any]) -> None:
    """Raises for a form that is not ours."""
    for key in ("samples_read", "samples_packed", "samples_rejected", "packs", "tokens"):
        _natural(manifest["counts"][key])
    _natural(manifest["seq_length"])
    Fraction(manifest["held_out"] or 0)
    if manifest["version"] > 2 and manifest["held_out"] and manifest["split"]["by"] not in get_args(SplitBy):
        raise ValueError(f"records cannot be held out by {manifest['split']['by']!r}")
    for entry in manifest["data"]:
        join(directory.location, entry["shards"])
        Fraction(entry["share"])
        bytes.fromhex(entry["sha256"])
        _natural(entry["samples"])
        _natural(entry["tokens"])
    _check_files(manifest["files"], {*ARRAYS, REJECTS})


def _check_files(files: dict[str, Any], expected: set[str]) -> None:
    if set(files) != expected:
        raise ValueError(f"it names the files {', '.join(sorted(files))}, not {', '.join(sorted(expected))}")
    for file in files.values():
        _natural(file["bytes"])
        bytes.fromhex(file["sha256"])


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no count")
    return number


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
    """The list of rejected samples against the manifest's counts of each reason."""
    listed: Counter[str] = Counter()
    with open(directory.local(REJECTS), "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                listed[str(json.loads(line)["kind"])] += 1
            except (ValueError, KeyError, TypeError, RecursionError):
                yield Damage(REJECTS, f"line {number} is no entry of a rejected sample", "changed")
    for reason in sorted({*listed, *counted}):
        found, count = listed[reason], counted.get(reason, 0)
        if found != count:
            yield Damage(REJECTS, f"it lists {found:,} samples under {reason!r}, not {count:,}", "changed")


def _strays(directory: Directory, known: set[str]) -> list[str]:
    """Files beside those of the manifest, which nothing reads; object storage is not listed."""
    if is_remote(directory.location):
        return []
    names = {path.name for path in Path(directory.location).iterdir()} - known - {MANIFEST}
    return [f"{name} is a file that the {MANIFEST} does not have; nothing reads it" for name in sorted(names)]
