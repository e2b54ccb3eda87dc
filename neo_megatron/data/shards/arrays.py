"""Writes ``.npy`` files, and reads them as arrays of a type that the reader knows.

``numpy.load`` would take type and shape from the file, evaluate its header, and take longer than all the rest of
opening a shard. Here the header is compared with the expected one: nothing is evaluated or unpickled.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.atomic_files import write_atomically
from neo_megatron.errors import damaged_file

_MAGIC = b"\x93NUMPY\x01\x00"
_PREFIX = 10  # bytes before the header text: the magic and the length of the text
_MAX_HEADER = 4096
_SHOWN = 160


def header_of(dtype: np.dtype, count: int) -> bytes:
    """The header of the ``.npy`` file of a one-dimensional array, whose ``count`` values follow it."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes a ``.npy`` file atomically; returns its entry in a manifest."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return write_atomically(path, buffer.getbuffer())


def array_of(content: np.ndarray, dtype: np.dtype, shape: tuple[int, ...] | None, path: str, remedy: str) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, as a view of them.

    Args:
        content: uint8 [n], the complete file.
        dtype: of the array.
        shape: of the array; ``None`` for one dimension of any length.
        path: of the file, for messages.
        remedy: for a damaged file.

    Raises:
        DamagedFile: the file holds anything else.
    """
    head = content[:_PREFIX].tobytes()
    start = _PREFIX + int.from_bytes(head[8:], "little")
    if len(head) < _PREFIX or not head.startswith(_MAGIC) or start > min(len(content), _PREFIX + _MAX_HEADER):
        raise damaged_file(path, "it is not a NumPy array", remedy)
    text = content[_PREFIX:start].tobytes().rstrip().decode("latin1")
    size = len(content) - start
    wanted = (size // dtype.itemsize,) if shape is None else shape
    # A dimension of any length follows from the size of the file, so a wrong number of rows differs from the header.
    described = f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': {wanted}, }}"
    if text != described:
        raise damaged_file(path, f"it is not an array of {described}, its header says {_printable(text)}", remedy)
    if size != dtype.itemsize * math.prod(wanted):
        raise damaged_file(path, f"it has {size} bytes of values, not those of {described}", remedy)
    return content[start:].view(dtype).reshape(wanted)


def _printable(text: str) -> str:
    shown = text[:_SHOWN].encode("ascii", "backslashreplace").decode()
    return shown if shown.isprintable() else repr(shown)
