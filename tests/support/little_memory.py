"""Reads annotation files in a process of its own, since memory that other tests left free is not limited."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_READ = """
import sys
from neo_megatron.data import memory_limit
from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import RejectedSample
memory_limit.MAX_DECODING_BYTES = int(sys.argv[1])
for path in sys.argv[2:]:
    source = Source("table", path)
    pieces = list(slices([source], 100))
    read = [record for piece in pieces for _, record in read_slice(piece, source, 0)]
    rejected = sum(isinstance(record, RejectedSample) for record in read)
    print(len(read), rejected, sum(bool(piece.broken) for piece in pieces))
"""


def read_with_limit(limit: int, files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """(records read, those that are rejected, slices that break off) of each file, under a limit of decoding."""
    command = [sys.executable, "-c", _READ, str(limit), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
