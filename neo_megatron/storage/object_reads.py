"""Reads objects by ranges as if they were open files, for any number of readers of a process.

An object is read in blocks of `BLOCK_BYTES`, the first of which is shorter, because many objects are read for their
beginning alone. The last blocks are kept, so small reads next to each other share a request. Where an object is read in
order, the blocks that follow are requested in advance, at the same time.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from functools import lru_cache
from typing import BinaryIO

from neo_megatron.errors import DataError
from neo_megatron.storage.object_requests import connection
from neo_megatron.storage.source_files import MissingObject, PartStream, ShorterObject, SourceState

FIRST_BYTES, BLOCK_BYTES = 1 << 20, 4 << 20
MOST_BLOCKS = 16  # that a process keeps: 64 MiB
_AHEAD = 6  # blocks that are requested in advance
# Objects that are requested in advance, and their first bytes that are: a larger one is requested again.
MOST_OBJECTS, AHEAD_BYTES = 64, 4 << 20
_MOST_HEADS = 1 << 16
_STREAM_BYTES = 1 << 18


def look(address: str) -> SourceState:
    """The state of an object now, which later reads of this process expect.

    Raises:
        MissingObject: there is no such object.
        DataError: it cannot be read.
    """
    state = _state(address)
    _reads().states[address] = state
    return state


def _state(address: str) -> SourceState:
    found = connection().repeat(lambda: connection().information(address), address)
    if found.type != "file":
        raise MissingObject(f"{address} is a directory; name an object")
    return SourceState(found.content_length, found.etag or str(found.last_modified))


def _known(address: str) -> SourceState:
    return _reads().states.get(address) or look(address)


def changed(address: str) -> DataError:
    """The error for an object that was replaced."""
    return DataError(
        f"{address} has changed since this run first read it; leave it as it is until a run has ended, and start again"
    )


def head_of(address: str, size: int) -> bytes:
    """The first bytes of an object, at most ``size``. Raises as `look`."""
    state, heads = _known(address), _reads().heads
    key = address, state.version, size
    if (known := heads.get(key)) is None:
        count = min(size, state.size)
        head = _request(address, state, 0, count) if count else b""
        _reads().keep_head(key, head)
        return head
    return known


def read_object(address: str, most: int) -> bytes:
    """The bytes of an object, as far as ``most`` + 1 of them, in one request, which may have been sent in advance.

    Raises:
        MissingObject: there is no such object.
        DataError: it cannot be read.
    """
    ahead = _reads().objects.pop(address, None)
    if ahead is not None and not ahead.cancel() and ahead.exception() is None:
        data = ahead.result()
        if len(data) <= min(most, AHEAD_BYTES):
            return data

    def read() -> bytes:
        try:
            return connection().read(address, 0, most + 1)
        except Exception as error:
            if connection().is_beyond_end(error):  # an empty object has no first byte
                return b""
            raise

    return connection().repeat(read, address)


def read_ahead(addresses: Iterable[str]) -> None:
    """Requests the first objects of many that `read_object` will read, and returns at once."""
    reads = _reads()
    for address in addresses:
        if address not in reads.objects:
            reads.objects[address] = connection().submit(connection().read, address, 0, AHEAD_BYTES + 1)
    while len(reads.objects) > MOST_OBJECTS:
        reads.objects.popitem(last=False)[1].cancel()


def _request(address: str, state: SourceState, offset: int, size: int) -> bytes:
    """Part of an object. Raises DataError if it is no longer there."""

    def read() -> bytes:
        data = connection().read(address, offset, size)
        if len(data) == size:
            return data
        if connection().information(address).content_length != state.size:
            raise changed(address)
        raise ConnectionError(f"{len(data)} bytes came instead of {size}")

    try:
        return connection().repeat(read, address)
    except (MissingObject, ShorterObject) as error:
        raise changed(address) from error


class RemoteFile:
    """A `source_files.SourceFile` in object storage.

    Args:
        address: of the object.
        version: that it must have; "" for any.

    Raises:
        MissingObject: there is no such object.
        DataError: it cannot be read, or has another version.
    """

    def __init__(self, address: str, version: str = "") -> None:
        self.name = address
        self._state = _known(address)
        if version and self._state.version != version:
            self._state = look(address)
            if self._state.version != version:
                raise changed(address)
        self.version = self._state.version
        self._end = _reads().ends.get(address, self._state.size)
        self._last = -1, b""  # number and bytes of the block that was read last

    @property
    def size(self) -> int:
        return self._state.size

    def pread(self, size: int, offset: int) -> bytes:
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        number = _block_of(offset)
        start = offset - _start_of(number)
        block = self._block(number)
        if start + end - offset <= len(block):
            return block[start : start + end - offset]
        parts = [block[start:]]
        for following in range(number + 1, _block_of(end - 1) + 1):
            parts.append(self._block(following)[: end - _start_of(following)])
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        known, block = self._last
        if known != number:
            block = _reads().block(self.name, self._state, number, self._end)
            self._last = number, block
        return block

    def stream(self) -> BinaryIO:
        return io.BufferedReader(PartStream(self.pread, 0, self.size, self.name), _STREAM_BYTES)

    def will_read(self, end: int) -> None:
        self._end = _reads().ends[self.name] = end  # also of those that are opened for the images of a slice

    def check_unchanged(self) -> None:
        try:
            now = _state(self.name)
        except MissingObject as error:
            raise changed(self.name) from error
        if now != self._state:
            raise changed(self.name)

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._last = -1, b""


def _block_of(offset: int) -> int:
    return 0 if offset < FIRST_BYTES else 1 + (offset - FIRST_BYTES) // BLOCK_BYTES


def _start_of(number: int) -> int:
    return FIRST_BYTES + (number - 1) * BLOCK_BYTES if number else 0


class _Reads:
    """All that a process has read or requested."""

    def __init__(self) -> None:
        self.states: dict[str, SourceState] = {}
        self.ends: dict[str, int] = {}  # offsets up to which objects will be read
        self.heads: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self.objects: OrderedDict[str, Future[bytes]] = OrderedDict()
        self._blocks: OrderedDict[tuple[str, str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def keep_head(self, key: tuple[str, str, int], head: bytes) -> None:
        """Keeps the first bytes of an object."""
        with self._lock:
            self.heads[key] = head
            while len(self.heads) > _MOST_HEADS:
                self.heads.popitem(last=False)

    def block(self, address: str, state: SourceState, number: int, end: int) -> bytes:
        """A block of an object; requests those that follow in front of ``end``, if those before it were read."""
        key = address, state.version, number
        while True:
            with self._lock:
                block = self._blocks.get(key)
                own = None if block else self._started(key)
                self._blocks.move_to_end(key)
                self._request_ahead(address, state, number, end)
            if own is not None:
                return self._fetch(key, state, own)
            # One that waits for its turn is requested here: threads that wait for each other would wait for ever.
            if block.cancel() or block.cancelled() or (block.done() and block.exception() is not None):
                self._forget(key, block)
                continue
            try:
                return block.result()
            except CancelledError:
                self._forget(key, block)
            except Exception:
                self._forget(key, block)  # requested in advance, and once: this reader repeats it

    def _started(self, key: tuple[str, str, int]) -> Future[bytes]:
        own: Future[bytes] = Future()
        own.set_running_or_notify_cancel()
        self._blocks[key] = own
        return own

    def _fetch(self, key: tuple[str, str, int], state: SourceState, own: Future[bytes]) -> bytes:
        try:
            data = _request(key[0], state, *_range(key[2], state))
        except BaseException as error:
            self._forget(key, own)
            own.set_exception(error)
            raise
        own.set_result(data)
        return data

    def _forget(self, key: tuple[str, str, int], block: Future[bytes]) -> None:
        with self._lock:
            if self._blocks.get(key) is block:
                del self._blocks[key]

    def _request_ahead(self, address: str, state: SourceState, number: int, end: int) -> None:
        read = 0
        while read < _AHEAD and number > read and (address, state.version, number - read - 1) in self._blocks:
            read += 1
        for following in range(number + 1, number + read + 1):
            offset, size = _range(following, state)
            key = address, state.version, following
            if size > 0 and offset < end and key not in self._blocks:
                self._blocks[key] = connection().submit(_request_once, address, offset, size)
        while len(self._blocks) > MOST_BLOCKS:
            self._blocks.popitem(last=False)[1].cancel()


def _request_once(address: str, offset: int, size: int) -> bytes:
    data = connection().read(address, offset, size)
    if len(data) != size:
        raise ConnectionError(f"{len(data)} bytes came instead of {size}")
    return data


def _range(number: int, state: SourceState) -> tuple[int, int]:
    """(offset, size) of a block."""
    start = _start_of(number)
    return start, min(_start_of(number + 1), state.size) - start


def _reads() -> _Reads:
    """The reads of this process; none after a fork, which the threads that send requests do not survive."""
    return _reads_of(os.getpid())


@lru_cache(maxsize=1)
def _reads_of(process: int) -> _Reads:
    return _Reads()
