"""The manifest of shards or packs, which is written last: a directory that has one is complete."""

import hashlib
import json
from pathlib import Path
from typing import Any

from neo_megatron.atomic_files import json_line, sync_directory, write_atomically
from neo_megatron.data.manifest_schema import REJECTS as REJECTS  # of both formats
from neo_megatron.data.manifest_schema import check_manifest
from neo_megatron.errors import DataError
from neo_megatron.paths import Kind, Wanted, WrongPath, check_path, wrong_kind
from neo_megatron.storage.base import MANIFEST, Directory, join
from neo_megatron.storage.open import open_directory

# By the ``format`` of a manifest.
_WANTED = {"neo-shards": Wanted.SHARDS, "neo-packs": Wanted.PACKS}
_KINDS = {"neo-shards": Kind.SHARDS, "neo-packs": Kind.PACKS}
_CHECKSUM = b',\n "sha256": "'
_MAX_MANIFEST = 1 << 29  # bytes: enough for 300,000 shards


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, as the last file of a directory; its last entry is the checksum of all before it."""
    text = json_line(manifest, indent=1).removesuffix(b"\n}\n")
    write_atomically(directory / MANIFEST, text + _CHECKSUM + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n')
    sync_directory(directory)


def check_vacant(directory: Path, marker: Path) -> None:
    """Checks that a new data set can be written into a directory; ``marker`` is the file of an unfinished one.

    Raises:
        DataError: it holds a data set, or other files and no marker, which another run may have just written.
    """
    if (directory / MANIFEST).exists():
        raise DataError(f"{directory} already holds a data set; remove it, or choose another --output")
    if any(directory.iterdir()) and not marker.exists():
        raise DataError(f"{directory} is not empty; choose another --output")


def is_as_written(manifest: bytes) -> bool:
    """Whether a manifest fits its checksum. A manifest edited by hand can still be opened; `verify` reports it."""
    text, _, checksum = manifest.rpartition(_CHECKSUM)
    return checksum == hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def read_manifest(directory: Directory | str | Path, kind: str, *versions: int) -> dict[str, Any]:
    """The manifest of a complete data set.

    Args:
        kind: its format, "neo-shards" or "neo-packs".
        versions: of the format, that can be read.

    Raises:
        DataError: as `manifest_bytes` and `parse_manifest`.
    """
    opened = open_directory(directory) if isinstance(directory, str | Path) else directory
    return parse_manifest(manifest_bytes(opened, _WANTED[kind]), opened.location, kind, *versions)


def manifest_bytes(directory: Directory, wanted: Wanted) -> bytes:
    """The bytes of a manifest. Raises DataError if there is no manifest, or one that is too large."""
    size = directory.size(MANIFEST)
    if size is None:
        check_path(directory.location, wanted)  # its message says what a local directory is instead
        raise DataError(f"{directory.location} does not hold {wanted.words}: it has no {MANIFEST}; correct the address")
    if size > _MAX_MANIFEST:
        path = join(directory.location, MANIFEST)
        raise DataError(
            f"{path} has {size:,} bytes, more than {_MAX_MANIFEST:,}; copy it again, or write the data set again"
        )
    return directory.read(MANIFEST)


def parse_manifest(text: bytes, location: str, kind: str, *versions: int) -> dict[str, Any]:
    """The contents of a manifest.

    Args:
        location: of its directory, for messages.

    Raises:
        DataError: it is of another kind or version, or has values that cannot be; see `manifest_schema`.
    """
    path = join(location, MANIFEST)
    try:
        manifest = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again, or write the data set again") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if written != kind and isinstance(written, str) and written in _KINDS:
        raise WrongPath(wrong_kind(location, _KINDS[written], _WANTED[kind]))
    version = manifest.get("version") if written == kind else None
    if type(version) is not int or version not in versions:
        known = " or ".join(map(str, versions))
        raise DataError(
            f"{path} does not describe {kind} of version {known}; write the data set again with this release"
        )
    try:
        check_manifest(manifest, kind)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); copy it again, or write the data set again") from error
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that occurs twice: readers would differ on its value."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return entries
