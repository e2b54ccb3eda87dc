"""A checkpoint of the shapes of NEO-2B in bfloat16, converted both ways, compared to a copy of its files.

Complete commands are measured, from the start of Python to the last byte on the disk; the copy is also flushed to the
disk. Inputs are in the page cache. Each way takes turns with a copy, whose output is deleted before, so that both write
into the same memory: a host may have to give a virtual machine memory again that it has not used for minutes, which
takes longer than the copy. It takes 15.6 GB of disk.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from neo_megatron.benchmarks.table import Row
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.checkpoint.hf_directory import write_json, write_safetensors
from neo_megatron.checkpoint.names import hf_shapes
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.to_hf import SHARD_BYTES
from neo_megatron.presets import SIZES

_SIZES = SIZES["neo-2b"]
_REPEATS = 5


@dataclass(frozen=True)
class Spent:
    """Cost of a piece of work: wall-clock seconds, CPU seconds of all cores, peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    memory: int


_UNITS = (
    ("seconds", attrgetter("seconds"), "<= 3 times"),
    ("CPU-seconds", attrgetter("cpu_seconds"), ""),
)


def measure(scratch: Path) -> list[Row]:
    """Times both conversions of a random NEO-2B and their peak memory, next to copies of the same files."""
    room = scratch / "convert"
    tokenizer = write_tokenizer(scratch / "tokenizer")
    source, megatron, output = room / "hf", room / "megatron", room / "output"
    stored = [StoredTensor(name, shape, torch.bfloat16) for name, shape in hf_shapes(_SIZES).items()]
    if not source.exists():
        _write_random(source, stored)
    total, largest = sum(tensor.nbytes for tensor in stored), max(tensor.nbytes for tensor in stored)
    limit = f"<= {(2 * largest + 10**9) / 1e6:,.0f}"
    there = ["hf-to-megatron", "--hf", source]
    back = ["megatron-to-hf", "--megatron", megatron, "--tokenizer", tokenizer]
    rows = []
    for way, command, written in (
        (f"Hugging Face to Megatron, {total / 1e9:.2f} GB", there, megatron),
        ("and back", back, output),
    ):
        rows += _next_to_copies(way, [*command, "--output", written], written, source, room / "copy", limit)
    for file in source.glob("*.safetensors"):
        if not filecmp.cmp(file, output / file.name, shallow=False):
            raise RuntimeError(f"{file.name} is not what it was after both conversions")
    shutil.rmtree(megatron)
    shutil.rmtree(output)
    return rows


def _next_to_copies(
    way: str, arguments: list[str | Path], written: Path, source: Path, copy: Path, memory_limit: str
) -> list[Row]:
    """Times a conversion and a copy of ``source``, in turns; keeps the output of the last conversion."""
    copies, ours = [], []
    for _ in range(_REPEATS):
        for place in (written, copy):
            shutil.rmtree(place, ignore_errors=True)
        copies.append(_spent(lambda: _copy(source, copy)))
        shutil.rmtree(copy)
        ours.append(_spent(lambda: _convert(arguments)))
    rows = [
        Row(way, unit, median(map(of, ours)), median(map(of, copies)), "copying the files", target)
        for unit, of, target in _UNITS
    ]
    return [*rows, Row(f"{way}: peak memory", "MB", max(each.memory for each in ours) / 1e6, target=memory_limit)]


def _write_random(directory: Path, stored: list[StoredTensor]) -> None:
    """Writes random tensors, each from another offset of the same noise: drawing all of it would take minutes."""
    noise = torch.empty(2**24, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))

    def values() -> Iterator[Tensor]:
        for number, tensor in enumerate(stored):
            count = tensor.nbytes // 2
            yield noise.roll(number).repeat(-(-count // len(noise)))[:count].view(tensor.shape)

    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_safetensors(partial, stored, values(), SHARD_BYTES)
    write_json(partial / "config.json", _SIZES.to_hf())
    partial.rename(directory)


def _spent(work: Callable[[], int]) -> Spent:
    """Runs work that waits for processes; returns its cost, with the largest of their memory peaks."""
    os.sync()
    begin, before = time.perf_counter(), os.times()
    memory = work()
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return Spent(time.perf_counter() - begin, cpu, memory)


def _copy(source: Path, output: Path) -> int:
    output.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, output / file.name)
        with (output / file.name).open("rb") as copy:
            os.fsync(copy.fileno())
    return 0


def _convert(arguments: list[str | Path]) -> int:
    command = [sys.executable, "-m", "neo_megatron", "convert", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024
