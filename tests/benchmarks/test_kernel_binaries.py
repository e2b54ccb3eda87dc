"""Registers, spills and shared memory of kernels of which they are known beforehand. No GPU is needed to compile."""

import pytest
import triton
import triton.language as tl

from neo_megatron.benchmarks.kernel_binaries import DEVICES, KIB, compile_kernel


@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count), mask=place < count)


@triton.jit
def product(left, right, out, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, INNER):
        a = tl.load(left + row[:, None] * count + start + inner[None, :])
        b = tl.load(right + (start + inner)[:, None] * COLUMNS + column[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], total)


def compiled_product(architecture: str, rows: int, columns: int, warps: int, stages: int):
    types = {"left": "*bf16", "right": "*bf16", "out": "*fp32", "count": "i32"}
    sizes = {"ROWS": rows, "COLUMNS": columns, "INNER": 32}
    return compile_kernel(product, types, sizes, architecture, warps, stages, ["count"])


@pytest.mark.parametrize("architecture", DEVICES)
def test_a_copy_takes_few_registers_and_nothing_else(architecture):
    types = {"source": "*bf16", "target": "*bf16", "count": "i32"}
    binary = compile_kernel(copy, types, {"BLOCK": 1024}, architecture, num_warps=8)
    assert binary.name == "copy" and binary.warps == 8
    assert 0 < binary.registers < 40 and binary.spilled == binary.shared == 0


def test_tiles_that_exceed_255_registers_a_thread_are_seen_to_spill():
    """A sum of 128 x 256 float32 is 256 registers for each thread of 4 warps, and 64 for each of 16."""
    crowded, roomy = (compiled_product("8.0", 128, 256, warps, 2) for warps in (4, 16))
    assert crowded.registers == 255 and crowded.spilled > 100
    assert 64 < roomy.registers <= 128 and roomy.spilled == 0


def test_each_further_stage_takes_shared_memory_for_one_more_pair_of_tiles():
    shared = [compiled_product("9.0", 64, 64, 4, stages).shared for stages in (3, 4)]
    assert shared[1] - shared[0] == (64 * 32 + 32 * 64) * 2
    assert shared[1] <= DEVICES["9.0"].shared == 227 * KIB
