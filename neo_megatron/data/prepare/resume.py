"""The output directory of an unfinished run of preprocessing: locked by one run at a time, resumed after a kill.

``run.json`` holds the plan: all that decides the bytes. It is locked while a run works, and is the last file that a
finished run removes. ``NNNNN.outcome.json`` holds the outcome of a slice; it appears after the files of its shard, so
slices that have one need not run again.
"""

import json
import os
import re
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from neo_megatron.atomic_files import PARTIAL, json_line, sync_directory, write_atomically
from neo_megatron.data.manifest import REJECTS, check_vacant
from neo_megatron.data.manifest_schema import check_outcome, check_plan
from neo_megatron.data.prepare.annotation_slices import Place
from neo_megatron.data.prepare.tallies import Noticed
from neo_megatron.data.shards.reader import VERSION
from neo_megatron.errors import DataError, damaged_file
from neo_megatron.locks import lock
from neo_megatron.storage.base import MANIFEST

PLAN = "run.json"
_OUTCOME = ".outcome.json"
_SOURCE_FLAGS = (
    "--input, --image-root, --registry, --datasets, --schema, --columns, --image-placeholder, --transform, "
    "--caption-prompts or --max-document-tokens, or other options of a data set in the registry"
)
_PLAN_REMEDY = "remove the directory to start again"
_OUTCOME_REMEDY = "remove it, and run the same command again"
_SAVED = re.compile(rf"(\d{{5}}|[1-9]\d{{5,17}}){re.escape(_OUTCOME)}", re.ASCII)
LARGEST = 1 << 30  # bytes; a million rejected records take about a quarter of this
# Files that a run may have left behind; files with other names are never removed.
_OURS = re.compile(rf"\d{{5,}}\.(tokens|spans|pictures|grids|samples|media)\..*|{REJECTS}|.*{re.escape(PARTIAL)}")


@dataclass
class Outcome:
    """The outcome of a slice.

    Args:
        next: position of the next slice.
        bytes: of the annotation file that were read.
        records: that were read.
        samples: that were read; a list-packed record has several.
        rejects: rows of ``rejects.jsonl``, one for each rejected sample.
        shard: entry of the manifest, ``None`` if no sample was kept.
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
        """Of the slice."""
        return self.next.number - 1


def save_outcome(directory: Path, outcome: Outcome) -> None:
    """Saves the outcome of a slice, as the last step of it."""
    sync_directory(directory)  # the shard must be on the disk before its outcome
    write_atomically(directory / name_of_outcome(outcome.number), outcome_line(outcome))


def load_outcome(directory: Path, number: int) -> Outcome:
    """The outcome of a slice that this run or an earlier one has saved.

    Raises:
        DamagedFile: it is not a file that `save_outcome` writes.
    """
    path = directory / name_of_outcome(number)
    return parse_outcome(_read(path, _OUTCOME_REMEDY), number, str(path))


def outcome_line(outcome: Outcome) -> bytes:
    """The file of an outcome."""
    return json_line(asdict(outcome))


def parse_outcome(data: bytes, number: int, path: str) -> Outcome:
    """The outcome of slice ``number`` in the bytes of its file.

    Raises:
        DamagedFile: they are not what `outcome_line` writes.
    """
    fields = _parse(data, path, _OUTCOME_REMEDY)
    try:
        check_outcome(fields, number, VERSION)
    except ValueError as error:
        raise damaged_file(path, str(error), _OUTCOME_REMEDY) from error
    return Outcome(**fields | {"next": Place(**fields["next"]), "noticed": Noticed(**fields["noticed"])})


def name_of_outcome(number: int) -> str:
    """The name of the file with the outcome of a slice."""
    return f"{number:05d}{_OUTCOME}"


def number_of_outcome(name: str) -> int | None:
    """The number of the slice whose outcome a file of this name holds; ``None`` for any other file."""
    return int(name.removesuffix(_OUTCOME)) if _SAVED.fullmatch(name) else None


def is_of_a_run(name: str) -> bool:
    """Whether a file belongs to a run, finished or not, by its name."""
    return bool(_OURS.fullmatch(name) or _SAVED.fullmatch(name))


def is_kept(name: str, done: Container[int]) -> bool:
    """Whether a file belongs to a slice that is done."""
    number = name.partition(".")[0]
    return number.isdigit() and int(number) in done and not name.endswith(PARTIAL)


def check_same_plan(data: bytes, plan: dict[str, Any], output: str, path: str) -> None:
    """Checks that the plan of the run to be continued, in the bytes of its file, equals that of this run.

    Raises:
        DataError: the plans differ; the text says in what.
        DamagedFile: the file does not hold a plan.
    """
    written = _parse(data, path, _PLAN_REMEDY)
    try:
        check_plan(written)
    except ValueError as error:
        raise damaged_file(path, str(error), _PLAN_REMEDY) from error
    if difference := _difference(written, json.loads(json_line(plan))):
        raise DataError(
            f"{output} holds an unfinished run {difference}; "
            "repeat its command to continue it, or remove the directory to start again"
        )


class Run:
    """A locked output directory, with the outcomes of an earlier run. Use it in a ``with`` statement.

    Raises:
        DataError: the directory holds a finished data set or other files, or another run is writing to it.
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
        """Whether the data set is complete, so that only clearing up is left."""
        return (self.directory / MANIFEST).exists()

    def begin(self, plan: dict[str, Any]) -> None:
        """Writes the plan of a new run, or checks that it equals that of the run to be continued.

        Raises:
            DataError: the plans differ; the text says in what.
        """
        if self._file.read().endswith(b"\n"):
            path = self.directory / PLAN
            check_same_plan(_read(path, _PLAN_REMEDY), plan, str(self.directory), str(path))
            return
        # Work starts when the plan is on the disk, so an incomplete plan means that there is nothing to continue.
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json_line(plan))
        self._file.flush()
        os.fsync(self._file.fileno())

    def outcomes(self) -> Iterator[Outcome]:
        """The outcomes of slices whose shards are there, in any order."""
        for path in self.directory.glob(f"*{_OUTCOME}"):
            if (number := number_of_outcome(path.name)) is None:
                continue
            outcome = load_outcome(self.directory, number)
            files = outcome.shard["files"] if outcome.shard else {}
            if all(_size(self.directory / name) == file["bytes"] for name, file in files.items()):
                yield outcome

    def keep(self, done: dict[int, Outcome]) -> None:
        """Removes the files of slices that are not done."""
        for path in list(self.directory.iterdir()):
            if is_of_a_run(path.name) and not is_kept(path.name, done):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes the files of an unfinished run; the plan last, so that the next run can finish this after a kill."""
        for path in list(self.directory.iterdir()):
            if _SAVED.fullmatch(path.name) or path.name.endswith(PARTIAL):
                path.unlink(missing_ok=True)
        sync_directory(self.directory)
        (self.directory / PLAN).unlink(missing_ok=True)


def _check_regular(path: Path, remedy: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise damaged_file(str(path), "it is not a regular file", remedy)


def _read(path: Path, remedy: str) -> bytes:
    """The bytes of a file of this module. Raises DamagedFile if it is not a regular file, or too large."""
    _check_regular(path, remedy)
    if path.stat().st_size > LARGEST:
        raise damaged_file(str(path), f"it has more than {LARGEST:,} bytes", remedy)
    return path.read_bytes()


def _parse(data: bytes, path: str, remedy: str) -> Any:
    """The contents of a JSON file. Raises DamagedFile if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged_file(path, f"it is not JSON ({error})", remedy) from error


def _lock(directory: Path) -> Any:
    """The open file of the plan, locked."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN
    if path.is_symlink() or path.exists():
        _check_regular(path, _PLAN_REMEDY)
    else:
        check_vacant(directory, path)
    return open(lock(path, directory), "r+b")  # noqa: SIM115 - closed by Run


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How the plan of a run differs from an earlier one, as the end of "an unfinished run ..."; "" if it does not."""
    for key, value in new["settings"].items():
        if key in old["settings"] and (before := old["settings"][key]) != value:
            return f"with --{key.replace('_', '-')} {before}, not {value}"
    for before, now in zip(old["sources"], new["sources"], strict=False):
        file = now["annotations"]
        state = {key: now[key] for key in ("bytes", "modified_ns", "etag") if key in now}
        if before != now and before | state == now:
            return f"of the annotation file {file}, which has changed since"
    for key, flags in (("sources", _SOURCE_FLAGS), ("tokenizer", "--tokenizer")):
        if old[key] != new[key]:
            return f"with another {flags}"
    return "" if old == new else "of another version of this program"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def without_details(outcome: Outcome) -> Outcome:
    """The outcome without details, which only its file has to keep."""
    return replace(outcome, rejects=[], shard=None, noticed=Noticed())
