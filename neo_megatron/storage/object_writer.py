"""Writes the files of a directory in object storage: each object is complete or absent, as servers promise."""

from collections.abc import Sequence
from pathlib import Path

from neo_megatron.errors import DataError
from neo_megatron.storage.object_requests import connection


class ObjectWriter:
    """A flat directory in object storage that is being written; it holds only its address, so it can be pickled.

    Requests are concurrent and retried like those of reading, see `object_requests`.

    Args:
        location: ``s3://bucket/prefix`` or ``msc://profile/prefix``.

    Raises:
        DataError: from any method: a request fails and repeating does not help.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Names of the objects and their sizes in bytes."""
        url = f"{self.location}/"
        return connection().repeat(lambda: connection().sizes(url), url)

    def read(self, names: Sequence[str], most: int) -> list[bytes]:
        """The bytes of objects as they are now, not from the cache. Raises DataError for more than ``most`` of them."""

        def fetch(name: str) -> bytes:
            url = self._url(name)
            size = connection().repeat(lambda: connection().information(url), url).content_length
            if size > most:
                raise DataError(f"{url} has {size:,} bytes, more than {most:,}: another program wrote it; remove it")
            return connection().repeat(lambda: connection().read(url, 0, size), url) if size else b""

        return connection().map(fetch, names)

    def write(self, name: str, data: bytes) -> None:
        """Makes an object of these bytes, or replaces it."""
        url = self._url(name)
        connection().repeat(lambda: connection().write(url, data), url, writes=True)

    def upload(self, files: Sequence[Path]) -> None:
        """Makes objects of files, under their names."""

        def send(file: Path) -> None:
            url = self._url(file.name)
            connection().repeat(lambda: connection().upload(url, file), url, writes=True)

        connection().map(send, files)

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects; those that are missing are left out."""
        urls = [self._url(name) for name in names]
        if urls:
            connection().repeat(lambda: connection().delete(urls), urls[0], writes=True)

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}"
