"""An output directory between the start of a run and its manifest: one run at a time, continued after a kill.

``run.json`` holds the plan, which is all that decides the bytes. It is locked while a run works, and is the last file
that a finished run removes. ``NNNNN.outcome.json`` says what became of a slice; it appears after the files of its
shard, so the slices that have one need not be done again.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from neo_megatron.atomic_files import PARTIAL, json_line, sync_directory, write_atomically
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.manifest_schema import check_outcome, check_plan
from neo_megatron.data.prepare.annotation_slices import Place
from neo_megatron.data.prepare.tallies import Noticed
from neo_megatron.data.shards.reader import VERSION
from neo_megatron.errors import DataError, damaged_file
from neo_megatron.locks import lock
from neo_megatron.storage.base import MANIFEST

PLAN = "run.json"
_OUTCOME = ".outcome.json"
_PLAN_REMEDY = "remove the directory to start again"
_SAVED = re.compile(rf"(\d{{5}}|[1-9]\d{{5,17}}){re.escape(_OUTCOME)}", re.ASCII)
_LARGEST = 1 << 30  # bytes; a million rejected records have about a quarter of this
# What a run of ours may have left behind; a file of any other name is not ours to remove.
_OURS = re.compile(rf"\d{{5,}}\.(tokens|spans|pictures|grids|samples|media)\..*|{REJECTS}|.*{re.escape(PARTIAL)}")


@dataclass
class Outcome:
    """What became of a slice.

    Args:
        next: where the next one begins.
        bytes: of the annotation file.
        records, samples: read, in a list-packed record several samples.
        rejects: of the samples that were left out, as in ``rejects.jsonl``.
        shard: entry of the manifest, ``None`` where nothing was kept.
        noticed: tallies of the samples that were kept.
    """

    next: Place
    bytes: int
    records: int = 0
    samples: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)
    shard: dict[str, Any] | None = None
    noticed: Noticed = field(default_factory=Noticed)

    @property
    def number(self) -> int:
        return self.next.number - 1


def save_outcome(directory: Path, outcome: Outcome) -> None:
    """The last step of a slice: from now on it is done."""
    sync_directory(directory)  # the shard is on the disk before anything says so
    write_atomically(_path(directory, outcome.number), json_line(asdict(outcome)))


def load_outcome(directory: Path, number: int) -> Outcome:
    """What an earlier run, or this one, has saved of a slice.

    Raises:
        DamagedFile: it is not what `save_outcome` writes.
    """
    path = _path(directory, number)
    remedy = "remove it, and the same command does this slice again"
    fields = _read_json(path, remedy)
    try:
        check_outcome(fields, number, VERSION)
    except ValueError as error:
        raise damaged_file(str(path), str(error), remedy) from error
    return Outcome(**fields | {"next": Place(**fields["next"]), "noticed": Noticed(**fields["noticed"])})


class Run:
    """A lock on an output directory, and what an earlier run has left there. Use it in a ``with`` statement.

    Raises:
        DataError: for a directory that holds something else, a finished data set, or a run that is still at work.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = _lock(directory)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # gives the lock back

    @property
    def has_manifest(self) -> bool:
        """Whether all that is left to do is to clear up."""
        return (self.directory / MANIFEST).exists()

    def begin(self, plan: dict[str, Any]) -> None:
        """Notes the plan of a new run, or checks that it is that of the run to be continued.

        Raises:
            DataError: where it is not; says what differs.
        """
        if self._file.read().endswith(b"\n"):
            path = self.directory / PLAN
            written = _read_json(path, _PLAN_REMEDY)
            try:
                check_plan(written)
            except ValueError as error:
                raise damaged_file(str(path), str(error), _PLAN_REMEDY) from error
            if difference := _difference(written, json.loads(json_line(plan))):
                raise DataError(
                    f"{self.directory} holds an unfinished run {difference}; "
                    "repeat its command to continue it, or remove the directory to start again"
                )
            return
        # Nothing is done before the plan is on the disk, so half a plan means that nothing is there.
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json_line(plan))
        self._file.flush()
        os.fsync(self._file.fileno())

    def outcomes(self) -> Iterator[Outcome]:
        """Of the slices whose shards are there, in no order."""
        for path in self.directory.glob(f"*{_OUTCOME}"):
            if not _SAVED.fullmatch(path.name):
                continue
            outcome = load_outcome(self.directory, int(path.name.removesuffix(_OUTCOME)))
            files = outcome.shard["files"] if outcome.shard else {}
            if all(_size(self.directory / name) == file["bytes"] for name, file in files.items()):
                yield outcome

    def keep(self, done: dict[int, Outcome]) -> None:
        """Removes what belongs to slices that are not done."""
        for path in list(self.directory.iterdir()):
            number = path.name.partition(".")[0]
            kept = number.isdigit() and int(number) in done and not path.name.endswith(PARTIAL)
            if not kept and (_OURS.fullmatch(path.name) or _SAVED.fullmatch(path.name)):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Leaves the data set alone; the plan goes last, so that a kill before that is put right by the next run."""
        for path in list(self.directory.iterdir()):
            if _SAVED.fullmatch(path.name) or path.name.endswith(PARTIAL):
                path.unlink(missing_ok=True)
        sync_directory(self.directory)
        (self.directory / PLAN).unlink(missing_ok=True)


def _check_regular(path: Path, remedy: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise damaged_file(str(path), "it is not a regular file", remedy)


def _read_json(path: Path, remedy: str) -> Any:
    """What one of our files says.

    Raises:
        DamagedFile: it is not a file of its own, larger than any of ours, or not JSON.
    """
    _check_regular(path, remedy)
    if path.stat().st_size > _LARGEST:
        raise damaged_file(str(path), f"it has more than {_LARGEST:,} bytes", remedy)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged_file(str(path), f"it is not JSON ({error})", remedy) from error


def _lock(directory: Path) -> Any:
    """The open file of the plan, locked."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN
    if path.is_symlink() or path.exists():
        _check_regular(path, _PLAN_REMEDY)
    else:
        if (directory / MANIFEST).exists():
            raise DataError(f"{directory} already holds a data set; remove it, or choose another --output")
        if any(directory.iterdir()) and not path.exists():
            raise DataError(f"{directory} is not empty; choose another --output")
    return open(lock(path, directory), "r+b")  # noqa: SIM115 - closed by Run


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What of the plan of a run is not as it was; "" where all is."""
    for key, value in new["settings"].items():
        if key in old["settings"] and (before := old["settings"][key]) != value:
            return f"with --{key.replace('_', '-')} {before}, not {value}"
    for before, now in zip(old["sources"], new["sources"], strict=False):
        file = now["annotations"]
        if before != now and before | {"bytes": now["bytes"], "modified_ns": now["modified_ns"]} == now:
            return f"of the annotation file {file} as it was before it was changed"
    for key, flags in (("sources", "--input, --image-root, --registry or --datasets"), ("tokenizer", "--tokenizer")):
        if old[key] != new[key]:
            return f"with another {flags}"
    return "" if old == new else "of another version of this program"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _path(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}{_OUTCOME}"


def without_details(outcome: Outcome) -> Outcome:
    """The outcome without what only its file has to keep."""
    return replace(outcome, rejects=[], shard=None, noticed=Noticed())
