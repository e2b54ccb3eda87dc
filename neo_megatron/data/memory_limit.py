"""A limit of the memory that this process may take for decoding, after the limits of `image_limits` and `video`.

Those are exact but know a file's structure alone. A decoder that takes far more than the structure shows, because of a
fault of its own, ends with a rejected sample here, not with a machine without memory.
"""

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from neo_megatron.errors import DataError, RejectedSample

# Three times what the largest allowed image takes; the frames of the largest allowed video take nearly as much.
MAX_DECODING_BYTES = 4 << 30

_PAGE = resource.getpagesize()
_lock = threading.Lock()
_inside = 0  # threads that decode
_before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Lets this process take `MAX_DECODING_BYTES` more than it holds; then allocations fail with a MemoryError.

    Threads share the limit of the first that entered. It counts the private memory of the process (``RLIMIT_DATA``), so
    other threads should not need gigabytes meanwhile; an export, which runs in processes of others, does not use it.

    Raises:
        DataError: decoding ran out of memory under a lower limit of the process, which does not make an image wrong.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (_lower(_held() + MAX_DECODING_BYTES, _before[0]), _before[1]))
        _inside += 1
    try:
        yield
    except RejectedSample as rejected:
        if isinstance(rejected.__cause__, MemoryError) and (lower := _other_limit()):
            raise DataError(
                f"{rejected.sentence}, but this process may take only {lower >> 20} MiB in all; allow it "
                f"{MAX_DECODING_BYTES >> 30} GiB more than it holds (ulimit -v, ulimit -d)"
            ) from rejected
        raise
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                resource.setrlimit(resource.RLIMIT_DATA, _before)


def _held() -> int:
    """Bytes of private memory that this process holds, as RLIMIT_DATA counts them (a stack more)."""
    # Not `Path.read_text`, which takes as long as all the rest.
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 256).split()[5]) * _PAGE
    finally:
        os.close(file)


def _lower(ours: int, theirs: int) -> int:
    return ours if theirs == resource.RLIM_INFINITY else min(ours, theirs)


def _other_limit() -> int:
    """The limit that holds for this process in addition to that for decoding, in bytes; 0 for none."""
    limits = (_before[0], resource.getrlimit(resource.RLIMIT_AS)[0])
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=0)
