"""Tensors between files and memory, block by block: a conversion holds two tensors and a block, whatever the model.

Buffers are used again and again: memory that a process has touched before is filled three times as fast as fresh pages.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from neo_megatron.errors import CheckpointError

BLOCK_BYTES = 2**20  # stays in a core's cache while it is checksummed, converted or copied
# The kernel caches a write in pages as large as it is; large ones are harder to find: 1 MiB took up to twice as long.
WRITE_BYTES = 2**17


@dataclass(frozen=True)
class StoredTensor:
    """Name, shape and dtype of a tensor, as a header states them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Readable(Protocol):
    """The part of a file that reading tensors needs."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Writable(Protocol):
    """The part of a file that writing tensors needs."""

    def write(self, data: memoryview, /) -> int: ...


class BlockWriter:
    """Passes bytes on in pieces of `WRITE_BYTES`."""

    def __init__(self, file: Writable) -> None:
        self._file = file

    def write(self, data: memoryview) -> int:
        for begin in range(0, len(data), WRITE_BYTES):
            self._file.write(data[begin : begin + WRITE_BYTES])
        return len(data)

    def flush(self) -> None:
        """Does nothing; `torch.save` calls it."""


def read_into(view: Tensor, file: Readable, dtype: torch.dtype) -> None:
    """Fills a view of any strides and type with the values of type ``dtype`` that come next in a file.

    Raises:
        CheckpointError: the file ends before; a finite value exceeds the range of the view's type.
    """
    for block, stored in _blocks(view, dtype):
        buffer = _bytes(stored)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise CheckpointError("the file ends in the middle of a tensor")
            buffer = buffer[count:]
        if stored is not block:
            copy_exactly(block, stored)


def write_from(view: Tensor, file: Writable) -> None:
    """Writes the values of a view of any strides, in the order of its dimensions."""
    pieces = BlockWriter(file)
    for block, stored in _blocks(view, view.dtype):
        if stored is not block:
            stored.copy_(block)
        pieces.write(_bytes(stored))


def copy_exactly(target: Tensor, source: Tensor) -> None:
    """Copies into another type; rounding is allowed, overflow is not.

    Raises:
        CheckpointError: a finite value exceeds the range of the type of ``target``.
    """
    target.copy_(source)
    narrower = target.dtype != source.dtype and torch.finfo(target.dtype).max < torch.finfo(source.dtype).max
    if narrower and not torch.equal(target.isinf(), source.isinf()):
        raise CheckpointError(f"a value exceeds what {target.dtype} can hold: give a --dtype of a wider range")


def _blocks(view: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of a view, each with contiguous memory for its values: the piece itself if it is contiguous."""
    view = torch.atleast_1d(view)
    row_bytes = math.prod(view.shape[1:]) * dtype.itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    scratch = None
    for block in view.split(rows):
        if block.is_contiguous() and block.dtype == dtype:
            yield block, block
        else:
            if scratch is None:
                scratch = torch.empty(rows * math.prod(view.shape[1:]), dtype=dtype)
            yield block, scratch[: block.numel()].view(block.shape)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def one_ahead(
    stored: Sequence[StoredTensor], fill: Callable[[StoredTensor, Tensor], None], what: str
) -> Iterator[Tensor]:
    """Yields a filled tensor for each of ``stored``, in order; a thread fills the next while the caller uses this one.

    Two buffers take turns: a tensor is the caller's until the next is asked for. What ``fill`` raises is raised here.

    Args:
        what: is done to them, for the bar that shows progress.
    """
    largest = max(tensor.nbytes for tensor in stored)
    buffers = [torch.empty(largest, dtype=torch.uint8).numpy() for _ in range(2)]

    def filled(turn: int) -> Tensor:
        wanted = stored[turn]
        # Of exactly this size: torch.save writes the entire storage of a tensor.
        tensor = torch.frombuffer(buffers[turn % 2], dtype=wanted.dtype, count=math.prod(wanted.shape))
        tensor = tensor.view(wanted.shape)
        fill(wanted, tensor)
        return tensor

    total = sum(tensor.nbytes for tensor in stored)
    with (
        ThreadPoolExecutor(1, "one-ahead") as reader,
        tqdm(total=total, unit="B", unit_scale=True, desc=what, mininterval=0.5) as bar,
    ):
        ahead = reader.submit(filled, 0)
        for turn in range(len(stored)):
            tensor = ahead.result()
            if turn + 1 < len(stored):
                ahead = reader.submit(filled, turn + 1)
            yield tensor
            bar.update(tensor.nbytes)


class FileWindow:
    """A part of an open file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if self._place < 0:
            raise CheckpointError("a position before the start of the file")
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        self._file.seek(self._offset + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
