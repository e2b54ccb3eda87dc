"""Opens a directory or a file: a path of the local disk, or an address of object storage.

Modules for object storage are imported only when such an address is opened. Nothing of a source is copied to the disk.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from neo_megatron.errors import DataError
from neo_megatron.redaction import credentials_refusal, has_credentials
from neo_megatron.storage.base import Directory, LocalDirectory, Range, is_remote
from neo_megatron.storage.source_files import LocalFile, SourceFile, SourceState


def open_directory(location: str | Path) -> Directory:
    """The directory at a local path, at ``s3://bucket/prefix``, or at ``msc://profile/prefix``.

    Raises:
        DataError: the address has credentials in it.
    """
    if not is_remote(location):
        return LocalDirectory(location)
    if has_credentials(str(location)):
        raise DataError(credentials_refusal(str(location)))
    from neo_megatron.storage.object_storage import ObjectDirectory

    return ObjectDirectory(str(location))


def open_source(path: str, version: str = "") -> SourceFile:
    """The file at a path or an address.

    Args:
        path: a path, or an address of object storage without credentials.
        version: that an object must have; "" for any.

    Raises:
        OSError: a local file cannot be opened.
        MissingObject: there is no such object.
        DataError: an object cannot be read, or has another version.
    """
    if not is_remote(path):
        return LocalFile(path)
    from neo_megatron.storage.object_reads import RemoteFile

    return RemoteFile(path, version)


def read_source(path: str, most: int) -> bytes:
    """The bytes of a file, as far as ``most`` + 1 of them: a result of that length is a file that is too large.

    Raises:
        OSError, MissingObject, DataError: as of `open_source`.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read(most + 1)
    from neo_megatron.storage.object_reads import read_object

    return read_object(path, most)


def source_head(path: str, size: int) -> bytes:
    """The first bytes of a file, at most ``size``; no more than these are requested of an object, and only once.

    Raises:
        OSError, MissingObject, DataError: as of `open_source`.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            return file.read(size)
    from neo_megatron.storage.object_reads import head_of

    return head_of(path, size)


def source_state(path: str) -> SourceState:
    """The state of a file now.

    Raises:
        OSError, MissingObject, DataError: as of `open_source`.
    """
    if not is_remote(path):
        status = os.stat(path)
        return SourceState(status.st_size, modified_ns=status.st_mtime_ns)
    from neo_megatron.storage.object_reads import look

    return look(path)


def concurrently[Result](work: Callable[[str], Result], paths: Sequence[str]) -> list[Result]:
    """The results of ``work`` for all paths, in order; if some are addresses, at the same time.

    Raises:
        Exception: the first, in their order.
    """
    if not any(map(is_remote, paths)):
        return list(map(work, paths))
    from neo_megatron.storage.object_requests import connection

    return connection().map(work, paths)


def read_ahead(paths: Iterable[str]) -> None:
    """Requests objects that `read_source` will read, at the same time, and returns at once; paths are left out."""
    addresses = [path for path in paths if is_remote(path)]
    if addresses:
        from neo_megatron.storage import object_reads

        object_reads.read_ahead(addresses)


def list_directory(location: str) -> tuple[list[str], list[str]]:
    """The names of the files and of the directories in a directory, sorted; links count as what they lead to.

    Raises:
        OSError, DataError: it cannot be read; an address under which nothing lies has no names.
    """
    if not is_remote(location):
        children = [(name, os.path.isdir(os.path.join(location, name))) for name in sorted(os.listdir(location))]
    else:
        from neo_megatron.storage.object_requests import connection

        url = f"{location.rstrip('/')}/"
        entries = connection().repeat(lambda: connection().entries(url), url)
        children = sorted((entry.name, entry.size is None) for entry in entries)
    return [name for name, is_directory in children if not is_directory], [
        name for name, is_directory in children if is_directory
    ]


def read_objects(places: Sequence[tuple[str, int, int]]) -> list[np.ndarray]:
    """Parts of objects, uint8 [size] each; neighbours share a request, and requests are concurrent.

    Args:
        places: (address, offset, size) of each.

    Raises:
        MissingObject: an object does not exist.
        ShorterObject: an object ends before a part.
        DataError: an object cannot be read.
    """
    from neo_megatron.storage.object_storage import object_at, read_ranges

    ends: dict[str, int] = {}
    for address, offset, size in places:
        ends[address] = max(ends.get(address, 0), offset + size)
    objects = {address: object_at(address, end) for address, end in ends.items()}
    return read_ranges([Range(objects[address], offset, size) for address, offset, size in places])
