"""Output that is either whole or not there: written aside, flushed to the disk, then renamed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from neo_megatron.data.errors import DataError

PARTIAL = ".partial"
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"


class WholeFile:
    """A binary file that appears under its name when ``commit`` is called; counts and hashes what is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = open(str(path) + PARTIAL, "wb")  # noqa: SIM115 - closed by commit

    def write(self, data: Any) -> None:
        """Appends bytes, or anything whose memory is contiguous."""
        self._hash.update(data)
        self.size += self._file.write(data)

    def commit(self) -> dict[str, Any]:
        """Flushes, renames, and returns what a manifest says of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(str(self.path) + PARTIAL, self.path)
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        os.unlink(str(self.path) + PARTIAL)


def write_whole(path: Path, data: Any) -> dict[str, Any]:
    file = WholeFile(path)
    file.write(data)
    return file.commit()


def json_line(entry: dict[str, Any], indent: int | None = None) -> bytes:
    """Readable in any language; a path that is no Unicode keeps its odd bytes as escapes."""
    return (json.dumps(entry, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Written last: a directory with a manifest is complete."""
    write_whole(directory / MANIFEST, json_line(manifest, indent=1))
    folder = os.open(directory, os.O_RDONLY)
    os.fsync(folder)  # the renames
    os.close(folder)


def read_manifest(directory: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a directory that holds a complete data set of the given kind and format version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory} holds no complete data set: it has no {MANIFEST}; write it again")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); write the data set again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind or manifest.get("version") != version:
        raise DataError(f"{path} does not describe {kind} of version {version}; write it again with this release")
    return manifest


def prepare_output(directory: Path, kind: str) -> None:
    """Makes an empty directory. Remains of a run of ours that was interrupted are removed, nothing else ever is."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / MANIFEST).exists():
        raise DataError(f"{directory} already holds a data set; remove it, or choose another --output")
    marker = directory / f"{kind}{PARTIAL}"
    if any(directory.iterdir()) and not marker.exists():
        raise DataError(f"{directory} is not empty; choose another --output")
    marker.touch()
    for path in directory.iterdir():
        if path != marker:
            path.unlink()


def finish_output(directory: Path, kind: str, manifest: dict[str, Any]) -> None:
    """Writes the manifest, and removes the mark of an unfinished run."""
    write_manifest(directory, {"format": kind, **manifest})
    (directory / f"{kind}{PARTIAL}").unlink()
