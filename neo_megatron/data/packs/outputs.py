"""Outputs of packs, which become complete together; the same command completes them after a kill."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from neo_megatron.atomic_files import PARTIAL
from neo_megatron.data.manifest import check_vacant, write_manifest
from neo_megatron.errors import DataError
from neo_megatron.locks import lock
from neo_megatron.storage.base import MANIFEST, is_remote
from neo_megatron.storage.object_writer import ObjectWriter
from neo_megatron.storage.staging import Staging, staging_path


class _Output(Protocol):
    """One output.

    Attributes:
        directory: local, in which the files are written.
    """

    directory: Path

    def claim(self) -> None:
        """Locks and marks the output. Raises DataError if it holds a data set or other files, or is being written."""
        ...

    def unmark_new(self) -> None:
        """Removes the mark if `claim` made it."""
        ...

    def has_manifest(self) -> bool: ...

    def clear(self) -> None:
        """Removes what an interrupted run left, first its manifest: it means that all other files are there."""
        ...

    def finish(self, manifest: dict[str, Any]) -> None:
        """Completes the output with its manifest."""
        ...

    def unmark(self) -> None: ...

    def close(self) -> None:
        """Releases the lock, and local room that was used for the time being."""
        ...


class NewOutputs:
    """Locked, empty outputs that become complete together. Use it in a ``with`` statement.

    Files of an interrupted run are removed, and no others.

    Args:
        locations: directories or addresses of object storage.
        kind: the ``format`` of their manifests.

    Attributes:
        directories: local, in which the files of each are written.

    Raises:
        DataError: an output holds a data set or other files, or another run is writing to it.
    """

    def __init__(self, locations: Sequence[str], kind: str) -> None:
        self._kind = kind
        self._outputs: list[_Output] = [
            _RemoteOutput(location, kind) if is_remote(location) else _LocalOutput(Path(location), kind)
            for location in locations
        ]
        self.directories = [output.directory for output in self._outputs]

    def __enter__(self) -> "NewOutputs":
        try:
            for output in self._outputs:
                output.claim()
            if all(output.has_manifest() for output in self._outputs):
                for output in self._outputs:  # an earlier run was killed when only this was left to do
                    output.unmark()
                self._outputs[0].claim()
        except BaseException:
            for output in self._outputs:
                output.unmark_new()
            self.__exit__()
            raise
        for output in self._outputs:
            output.clear()
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for output in self._outputs:
                stack.callback(output.close)

    def finish(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Writes the manifests, and then removes the marks of an unfinished run."""
        for output, manifest in zip(self._outputs, manifests, strict=True):
            output.finish({"format": self._kind, **manifest})
        for output in self._outputs:
            output.unmark()


class _LocalOutput:
    """A directory, in which files are written where they stay."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self._mark = directory / f"{kind}{PARTIAL}"
        self._lock: int | None = None
        self._is_new = False

    def claim(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._mark.exists():
            check_vacant(self.directory, self._mark)
            self._is_new = True
        if self._lock is None:
            self._lock = lock(self._mark, self.directory)

    def unmark_new(self) -> None:
        if self._is_new:
            self._mark.unlink(missing_ok=True)

    def has_manifest(self) -> bool:
        return (self.directory / MANIFEST).exists()

    def clear(self) -> None:
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path != self._mark:
                path.unlink()

    def finish(self, manifest: dict[str, Any]) -> None:
        write_manifest(self.directory, manifest)

    def unmark(self) -> None:
        self._mark.unlink()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)


class _RemoteOutput:
    """A prefix of object storage; files are written into a directory of ``TMPDIR`` and uploaded at the end.

    There are no locks between machines; two runs of the same command write the same bytes.
    """

    def __init__(self, location: str, kind: str) -> None:
        self.directory = staging_path(location.rstrip("/"))
        self._staging: Staging | None = None
        self._objects = ObjectWriter(location)
        self._mark = f"{kind}{PARTIAL}"
        self._found: set[str] = set()
        self._is_new = False

    def claim(self) -> None:
        location = self._objects.location
        if self._staging is None:
            self._staging = Staging(location)
        self._found = set(self._objects.sizes())
        if self._mark in self._found:
            return
        if MANIFEST in self._found:
            raise DataError(f"{location} already holds a data set; remove it, or choose another --output")
        if self._found:
            raise DataError(f"{location} is not empty; choose another --output")
        self._objects.write(self._mark, b"")
        self._is_new = True

    def unmark_new(self) -> None:
        if self._is_new:
            self.unmark()

    def has_manifest(self) -> bool:
        return MANIFEST in self._found

    def clear(self) -> None:
        self._objects.delete([MANIFEST] if MANIFEST in self._found else [])
        self._objects.delete(sorted(self._found - {MANIFEST, self._mark}))

    def finish(self, manifest: dict[str, Any]) -> None:
        self._objects.upload(sorted(self.directory.iterdir()))
        write_manifest(self.directory, manifest)
        self._objects.upload([self.directory / MANIFEST])

    def unmark(self) -> None:
        self._objects.delete([self._mark])

    def close(self) -> None:
        if self._staging is not None:
            self._staging.close()
