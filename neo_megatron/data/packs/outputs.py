"""Output directories of packs, which become complete together; the same command completes them after a kill."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_megatron.atomic_files import PARTIAL
from neo_megatron.data.manifest import check_vacant, write_manifest
from neo_megatron.locks import lock
from neo_megatron.storage.base import MANIFEST


class NewOutputs:
    """Locked, empty directories that become complete together. Use it in a ``with`` statement.

    Files of an interrupted run are removed, and no others.

    Raises:
        DataError: a directory holds a data set or other files, or another run is writing to it.
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
                    check_vacant(directory, marker)
                    fresh.append(marker)
                self._locks.append(lock(marker, directory))
            if all((directory / MANIFEST).exists() for directory in self._directories):
                self._remove_marks()  # an earlier run was killed when only this was left to do
                check_vacant(self._directories[0], self._marker(self._directories[0]))
        except BaseException:
            for marker in fresh:
                marker.unlink(missing_ok=True)
            self.__exit__()
            raise
        for directory in self._directories:
            (directory / MANIFEST).unlink(missing_ok=True)  # first, because it means that all other files are there
            for path in directory.iterdir():
                if path != self._marker(directory):
                    path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._locks:
            os.close(descriptor)

    def finish(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Writes the manifests, and then removes the marker files of an unfinished run."""
        for directory, manifest in zip(self._directories, manifests, strict=True):
            write_manifest(directory, {"format": self._kind, **manifest})
        self._remove_marks()

    def _marker(self, directory: Path) -> Path:
        return directory / f"{self._kind}{PARTIAL}"

    def _remove_marks(self) -> None:
        for directory in self._directories:
            self._marker(directory).unlink()
