"""Output that is either whole or not there: written aside, flushed to the disk, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_megatron.data.errors import DataError
from neo_megatron.data.manifest_schema import REJECTS as REJECTS  # of both formats
from neo_megatron.data.manifest_schema import check_manifest
from neo_megatron.data.storage import Directory, join, open_directory
from neo_megatron.locks import lock
from neo_megatron.paths import Kind, Wanted, WrongPath, check_path, wrong_kind

PARTIAL = ".partial"
MANIFEST = "manifest.json"
# The formats of manifests.
_WANTED = {"neo-shards": Wanted.SHARDS, "neo-packs": Wanted.PACKS}
_KINDS = {"neo-shards": Kind.SHARDS, "neo-packs": Kind.PACKS}
_PARTIAL_NAME = re.compile(rf".+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
_CHECKSUM = b',\n "sha256": "'
_MAX_MANIFEST = 1 << 29  # bytes; of 300,000 shards


class WholeFile:
    """A binary file that appears under its name when ``commit`` is called; counts and hashes what is written.

    Raises:
        DataError: from any method, where the disk does not take the bytes; nothing of the file is left behind then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        # A name of its own: a process that outlives a killed run neither writes into this file nor renames it.
        self._partial = Path(f"{path}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by commit and discard
        except OSError as error:
            raise _refused(path, error) from error

    def write(self, data: Any) -> None:
        """Appends bytes, or anything whose memory is contiguous."""
        self._hash.update(data)
        try:
            self.size += self._file.write(data)
        except OSError as error:
            self.discard()
            raise _refused(self.path, error) from error

    def commit(self) -> dict[str, Any]:
        """Flushes, renames, and returns what a manifest says of the file."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
        except OSError as error:
            self.discard()
            raise _refused(self.path, error) from error
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        """Leaves nothing behind; what was committed stays."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which nobody wants any more
            self._file.close()
        self._partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file is what a kill has left of a `WholeFile`."""
    return _PARTIAL_NAME.fullmatch(name) is not None


def _refused(path: Path, error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free space" if full else "remedy that"
    return DataError(f"{path} cannot be written ({error.strerror}); {remedy}, then run the same command again")


def write_whole(path: Path, data: Any) -> dict[str, Any]:
    file = WholeFile(path)
    file.write(data)
    return file.commit()


def json_line(entry: dict[str, Any], indent: int | None = None) -> bytes:
    """Readable in any language; a path that is no Unicode keeps its odd bytes as escapes."""
    return (json.dumps(entry, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Written last: a directory with a manifest is complete. Its last entry is the checksum of all before it."""
    text = json_line(manifest, indent=1).removesuffix(b"\n}\n")
    write_whole(directory / MANIFEST, text + _CHECKSUM + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n')
    sync_directory(directory)


def is_as_written(manifest: bytes) -> bool:
    """Whether a manifest fits its checksum. One that was edited with care still opens; `verify` says so."""
    text, _, checksum = manifest.rpartition(_CHECKSUM)
    return checksum == hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def sync_directory(directory: Path) -> None:
    """Brings the renames so far to the disk."""
    folder = os.open(directory, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read_manifest(directory: Directory | str | Path, kind: str, *versions: int) -> dict[str, Any]:
    """The manifest of a directory that holds a complete data set of the given kind, in one of the format versions."""
    opened = open_directory(directory) if isinstance(directory, str | Path) else directory
    return parse_manifest(manifest_bytes(opened, _WANTED[kind]), opened.location, kind, *versions)


def manifest_bytes(directory: Directory, wanted: Wanted) -> bytes:
    """The manifest as it was written. Raises DataError where there is none."""
    size = directory.size(MANIFEST)
    if size is None:
        check_path(directory.location, wanted)  # says what a local directory is instead
        raise DataError(f"{directory.location} does not hold {wanted.words}: it has no {MANIFEST}; correct the address")
    if size > _MAX_MANIFEST:
        path = join(directory.location, MANIFEST)
        raise DataError(
            f"{path} has {size} bytes, more than {_MAX_MANIFEST}; copy it again, or write the data set again"
        )
    return directory.read(MANIFEST)


def parse_manifest(text: bytes, location: str, kind: str, *versions: int) -> dict[str, Any]:
    """What the manifest at a location says.

    Raises:
        DataError: it is of another kind or version, or says what cannot be; see `manifest_schema`.
    """
    path = join(location, MANIFEST)
    try:
        manifest = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); write the data set again") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if written != kind and isinstance(written, str) and written in _KINDS:
        raise WrongPath(wrong_kind(location, _KINDS[written], _WANTED[kind]))
    version = manifest.get("version") if written == kind else None
    if type(version) is not int or version not in versions:
        known = " or ".join(map(str, versions))
        raise DataError(f"{path} does not describe {kind} of version {known}; write it again with this release")
    try:
        check_manifest(manifest, kind)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); copy it again, or write the data set again") from error
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that stands twice: readers would differ on what it says."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return entries


class NewOutputs:
    """Empty directories, locked, that become complete together: for the readers, or for the same command after a kill.

    Use it in a ``with`` statement. What an interrupted run of ours has left is removed, and nothing else.

    Raises:
        DataError: a directory holds a data set or something else, or another run is writing to it.
    """

    def __init__(self, directories: Sequence[Path], kind: str) -> None:
        self._directories, self._kind = directories, kind
        self._locks: list[int] = []

    def __enter__(self) -> "NewOutputs":
        fresh = []
        try:
            for directory in self._directories:
                directory.mkdir(parents=True, exist_ok=True)
                marker = self._marker(directory)
                if not marker.exists():
                    _refuse_full(directory)
                    fresh.append(marker)
                self._locks.append(lock(marker, directory))
            if all((directory / MANIFEST).exists() for directory in self._directories):
                self._remove_marks()  # a kill came when all was done but this
                _refuse_full(self._directories[0])
        except BaseException:
            for marker in fresh:
                marker.unlink(missing_ok=True)
            self.__exit__()
            raise
        for directory in self._directories:
            (directory / MANIFEST).unlink(missing_ok=True)  # first, as it says that all the others are there
            for path in directory.iterdir():
                if path != self._marker(directory):
                    path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._locks:
            os.close(descriptor)

    def finish(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Writes the manifests, and then removes the marks of an unfinished run."""
        for directory, manifest in zip(self._directories, manifests, strict=True):
            write_manifest(directory, {"format": self._kind, **manifest})
        self._remove_marks()

    def _marker(self, directory: Path) -> Path:
        return directory / f"{self._kind}{PARTIAL}"

    def _remove_marks(self) -> None:
        for directory in self._directories:
            self._marker(directory).unlink()


def _refuse_full(directory: Path) -> None:
    if (directory / MANIFEST).exists():
        raise DataError(f"{directory} already holds a data set; remove it, or choose another --output")
    if any(directory.iterdir()):
        raise DataError(f"{directory} is not empty; choose another --output")
