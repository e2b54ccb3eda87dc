"""Sends requests to object storage: concurrently, retried while the server fails, with one message if they fail.

They use ``multi-storage-client``, the library that Megatron and Energon use, and are configured as it documents: by
``AWS_*`` variables, or by its configuration file. The variables below add to that.

=============================  ==========================  =========================================================
``NEO_CACHE_DIR``              ~/.cache/neo-megatron       cache of complete files (manifests, indices, packs)
``NEO_CACHE_GB``               64                          its size in GB; least recently used files are removed
``NEO_STORAGE_CONNECTIONS``    32                          concurrent requests of a process
``NEO_STORAGE_RETRY_SECONDS``  300                         seconds for which a failing request is retried
``NEO_STORAGE_TIMEOUT``        20                          seconds to wait for a connection, and for the next byte; a
                                                           profile of the configuration file has its own
=============================  ==========================  =========================================================
"""

import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from neo_megatron.errors import DataError
from neo_megatron.packages import install
from neo_megatron.storage.file_cache import FileCache
from neo_megatron.storage.source_files import MissingObject, ShorterObject

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a retry
# Words of messages: what was not done, and what the credentials need for it; and how to go on.
_READ = ("read", "s3:GetObject, and s3:ListBucket to tell a missing object from a forbidden one")
_WRITTEN = ("written", "s3:PutObject, s3:DeleteObject and s3:ListBucket")
_REMEDY = "once the server answers again, run the same command again: it continues"
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An object, or a directory of objects, directly under a prefix.

    Args:
        name: without the prefix and without a slash.
        size: of an object, in bytes; ``None`` for a directory.
    """

    name: str
    size: int | None


class Connection:
    """The cache, threads and clients with which one process reads from object storage.

    Attributes:
        cache: of complete files.
        connections: concurrent requests.

    Raises:
        DataError: multi-storage-client is not installed, or a variable is not a number above 0.
    """

    def __init__(self) -> None:
        try:
            from multistorageclient.types import RetryableError
        except ImportError as error:
            raise DataError(f"object storage needs multi-storage-client: {install('multistorageclient')}") from error
        # Raised by the library when a request fails; anything else is a bug.
        self._failures = (RetryableError, RuntimeError, OSError)
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = Path(os.environ.get("NEO_CACHE_DIR") or home / "neo-megatron")
        self.cache = FileCache(directory, int(_setting("NEO_CACHE_GB", 64) * 1e9))
        self.connections = max(1, int(_setting("NEO_STORAGE_CONNECTIONS", 32)))
        self._retry_seconds = _setting("NEO_STORAGE_RETRY_SECONDS", 300)
        self._timeout = _setting("NEO_STORAGE_TIMEOUT", 20)
        self._threads = ThreadPoolExecutor(self.connections, "object-storage")
        self._clients: dict[str, Any] = {}

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Requests part of an object; returns fewer bytes if it is shorter."""
        from multistorageclient.types import Range

        client, path = self._client(url)
        return client.read(path, byte_range=Range(offset, size))

    def information(self, url: str) -> Any:
        """Requests ``content_length``, ``etag`` and ``last_modified`` of an object."""
        client, path = self._client(url)
        return client.info(path, strict=False)  # strict would list the prefix, which needs another permission

    def write(self, url: str, data: bytes) -> None:
        """Requests that an object has these bytes."""
        client, path = self._client(url)
        client.write(path, data)

    def upload(self, url: str, file: Path) -> None:
        """Requests that an object has the bytes of a file, in several requests for a large one."""
        client, path = self._client(url)
        client.upload_file(path, str(file))

    def entries(self, url: str) -> list[Entry]:
        """Requests what is directly under a prefix, which ends with a slash; names come in no order."""
        client, path = self._client(url)
        try:
            found = list(client.list(path=path, include_directories=True))
        except Exception as error:
            # For other requests the library wraps the errors of botocore.
            if type(error).__module__.split(".")[0] != "botocore":
                raise
            raise RuntimeError(str(error)) from error
        return [
            Entry(entry.key.rstrip("/").rpartition("/")[2], entry.content_length if entry.type == "file" else None)
            for entry in found
            if entry.key.rstrip("/") != path.rstrip("/")  # the empty object that a console makes for a directory
        ]

    def sizes(self, url: str) -> dict[str, int]:
        """Requests the names and sizes of the objects directly under a prefix, which ends with a slash."""
        return {entry.name: entry.size for entry in self.entries(url) if entry.size is not None}

    def delete(self, urls: Sequence[str]) -> None:
        """Requests that objects of one bucket no longer exist."""
        places = [self._client(url) for url in urls]
        places[0][0].delete_many([path for _, path in places])

    def submit[Result](self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Runs ``work`` in a thread, when one is free."""
        return self._threads.submit(work, *arguments)

    def is_beyond_end(self, error: Exception) -> bool:
        """Whether a request failed because the object ends before the first byte of the range."""
        return isinstance(error, self._failures) and _answer(error)[0] == 416

    def map[Item, Result](self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Runs ``work`` for all items concurrently. After a failure it waits for those that are running, and raises."""
        if len(items) <= 1:
            return [work(item) for item in items]
        futures = [self._threads.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def repeat[Result](self, request: Callable[[], Result], url: str, writes: bool = False) -> Result:
        """The result of a request, which is retried with growing pauses while the server fails.

        Args:
            request: is called for each attempt.
            url: of the object, for messages.
            writes: whether it changes an object, for messages.

        Raises:
            MissingObject: the object does not exist.
            DataError: retrying cannot help or has not helped.
        """
        start, pause, attempts = time.monotonic(), _FIRST_WAIT, 0
        while True:
            attempts += 1
            try:
                return request()
            except self._failures as error:
                verb, permissions = _WRITTEN if writes else _READ
                _raise_if_permanent(error, url, verb, permissions)
                waited = time.monotonic() - start
                if waited + pause > self._retry_seconds:
                    count = f"{attempts} attempt{'s' * (attempts > 1)}"
                    raise DataError(
                        f"{url} could not be {verb}: {_reason(error)}; given up after {count} in "
                        f"{waited:.0f} seconds; {_REMEDY}"
                    ) from error
                _log.warning("%s: %s; trying again in %.1f seconds", url, _reason(error), pause)
            time.sleep(pause * random.uniform(0.5, 1))  # processes that fail at the same time should retry apart
            pause = min(2 * pause, _LONGEST_WAIT)

    def _client(self, url: str) -> tuple[Any, str]:
        """The library's client for the bucket or profile of a URL, and the object's path for that client."""
        scheme, path = url.split("://", 1)
        place = f"{scheme}://{path.split('/')[0]}"
        if place not in self._clients:
            self._clients[place] = self._open_client(place)
        client, prefix = self._clients[place]
        return client, prefix + path.partition("/")[2]

    def _open_client(self, place: str) -> tuple[Any, str]:
        """The client for ``s3://bucket`` or ``msc://profile``, and the path of the bucket's root for it."""
        import multistorageclient
        from multistorageclient import StorageClient, StorageClientConfig

        try:
            config, _ = StorageClientConfig.read_msc_config()
            profile = place.replace("s3://", "_s3-")
            mapped = StorageClientConfig.read_path_mapping().find_mapping(f"{place}/")
            if place.startswith("msc://") or mapped or profile in (config or {}).get("profiles", {}):
                client, prefix = multistorageclient.resolve_storage_client(f"{place}/")
                return client, f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
            config = {**(config or {}), "profiles": {profile: self._profile(place.removeprefix("s3://"))}}
            client = StorageClient(StorageClientConfig.from_dict(config, profile, skip_validation=True))
            return client, ""
        except Exception as error:
            raise DataError(
                f"{place} cannot be opened: {error}; check the configuration of multi-storage-client, and that "
                "neo-megatron[s3] is installed"
            ) from error

    def _profile(self, bucket: str) -> dict[str, Any]:
        """A profile without retries, which are done here; the default would wait 3 x 3 times 60 seconds."""
        options = {
            "base_path": bucket,
            "connect_timeout": self._timeout,
            "read_timeout": self._timeout,
            "max_pool_connections": self.connections,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        return {"storage_provider": {"type": "s3", "options": options}, "retry": {"attempts": 1}}


def connection() -> Connection:
    """The connection of this process; another one after a fork, which neither threads nor sockets survive."""
    return _connection_of(os.getpid())


@lru_cache(maxsize=1)
def _connection_of(process: int) -> Connection:
    return Connection()


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise DataError(f"{name} must be a number above 0, not {text!r}")
    return value


def _raise_if_permanent(error: Exception, url: str, verb: str, permissions: str) -> None:
    """Raises DataError for a failure that retrying cannot remedy."""
    place = "/".join(url.split("/")[:3])
    status, code = _answer(error)
    if code == "NoSuchBucket":
        raise DataError(f"{place} does not exist; check its name, and AWS_ENDPOINT_URL if it is set") from error
    if isinstance(error, FileNotFoundError) or status == 404:
        raise MissingObject(f"{url} is missing; copy the data set again") from error
    if isinstance(error, PermissionError) or status in (401, 403):
        raise DataError(
            f"{url} may not be {verb} ({code or 'access denied'}); check the credentials: they need {permissions}"
        ) from error
    if any(type(cause).__name__ in _NO_CREDENTIALS for cause in _causes(error)):
        raise DataError(
            f"{place} needs credentials and there are none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "configure multi-storage-client"
        ) from error
    if any(type(cause).__name__ == "ParamValidationError" for cause in _causes(error)):
        raise DataError(f"{place} is not the address of a bucket: {_reason(error)}; check its name") from error
    if status == 416:
        raise ShorterObject(f"{url} is shorter than its manifest says; copy it again") from error
    if status and 400 <= status < 500 and status not in (408, 429):
        raise DataError(f"{url} cannot be {verb}: {_reason(error)}; check the region and the endpoint") from error


_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and its causes, as the library wraps errors of botocore."""
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _answer(error: Exception) -> tuple[int | None, str]:
    """HTTP status and error code of the server's answer; (``None``, "") without an answer."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    return None, ""


def _reason(error: Exception) -> str:
    """The reason of a failure: the server's answer, else the message of botocore, else that of the library."""
    status, code = _answer(error)
    if status:
        return f"the server answers {status}" + (f" ({code})" if code and code != str(status) else "")
    causes = _causes(error)
    named = [cause for cause in causes if type(cause).__module__.split(".")[0] == "botocore"]
    return " ".join(str((named or causes)[0]).split())
