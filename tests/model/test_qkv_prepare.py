"""The function that a GPU compiles against what a CPU computes part by part, and against the definition in float64."""

from pathlib import Path

import pytest
import torch
from support.processes import run_python

from neo_megatron.model import qkv_prepare
from neo_megatron.model.native_rope import NativeRotary

S, B, G, R, D, EPS = 5, 2, 2, 3, 16, 1e-6


@pytest.fixture
def given():
    """Projections, norms of queries and of keys, tables; two packs, whose positions differ."""
    draw = torch.Generator().manual_seed(0)
    qkv, qk_hw = (torch.randn(S, B, G, heads, D, generator=draw) for heads in (R + 2, R + 1))
    norms = [torch.rand(width, generator=draw) + 0.5 for width in (D, D // 2, D // 2, D, D // 2, D // 2)]
    rotary = NativeRotary.from_positions(torch.randint(0, 99, (B, S, 3), generator=draw), D, 1e6, 1e4)
    return [qkv, qk_hw, *norms], rotary


def run(function, tensors, last, dtype):
    """Heads, and the gradients of everything towards a fixed direction."""
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    heads = function(tensors[0], tensors[1], tensors[2:5], tensors[5:8], last, EPS)
    draw = torch.Generator().manual_seed(1)
    towards = [torch.randn(part.shape, generator=draw).to(dtype) for part in heads]
    return [*heads, *torch.autograd.grad(heads, tensors, towards)]


def written_out(qkv, qk_hw, query_norms, key_norms, tables, eps):
    """The definition, head by head: norm, half-rotation as in Qwen3, [t | h | w]."""

    def part(x, weight, table):
        cos, sin = (torch.cat((half, half), dim=-1)[:, :, 0, 0] for half in table)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def head(t, hw, norms):
        return torch.cat([part(*given) for given in zip((t, *hw.chunk(2, -1)), norms, tables, strict=True)], dim=-1)

    queries = [head(qkv[:, :, g, r], qk_hw[:, :, g, r], query_norms) for g in range(G) for r in range(R)]
    keys = [head(qkv[:, :, g, R], qk_hw[:, :, g, R], key_norms) for g in range(G)]
    return torch.stack(queries, dim=2), torch.stack(keys, dim=2), qkv[:, :, :, R + 1]


def test_compiled_and_eager_functions_equal_the_definition(given):
    tensors, rotary = given
    tables = tuple((table.cos, table.sin) for table in rotary.tables)
    expected = run(written_out, tensors, [[x.double() for x in pair] for pair in tables], torch.float64)
    for function, last in ((qkv_prepare.query_key_value, rotary), (qkv_prepare.at_once, tables)):
        actual = run(function, tensors, last, torch.float32)
        torch.testing.assert_close(actual, [x.float() for x in expected], atol=2e-5, rtol=1e-5)


def test_in_bfloat16_heads_are_rounded_once(given):
    tensors, rotary = given
    tables = tuple((table.cos, table.sin) for table in rotary.tables)
    tensors = [tensor.bfloat16() for tensor in tensors]
    exact = run(written_out, tensors, [[x.double() for x in pair] for pair in tables], torch.float64)
    heads = run(qkv_prepare.at_once, tensors, tables, torch.bfloat16)[:3]
    for actual, expected in zip(heads, exact, strict=False):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected.bfloat16(), atol=1e-6, rtol=2**-7)


def test_other_packs_cause_no_recompilation():
    done = run_python(Path(__file__).parent / "compile_worker.py", environment={"TORCHDYNAMO_DISABLE": "0"})
    assert done.returncode == 0 and "one graph each" in done.stdout, done.stdout[-3000:]
