"""The functions of a CPU, and the reference of a GPU's kernel, against the definition in float64."""

import pytest
import torch

from neo_megatron.model import qkv_prepare
from neo_megatron.model.native_rope import NativeRotary

S, B, G, R, D, EPS = 5, 2, 2, 3, 16, 1e-6


# Query heads and others of each projection, widths of the norms, and channels for t, h and w.
FORMS = {
    "separate": ((R + 2, R + 1), (D, D // 2, D // 2), (D, D // 2, D // 2)),
    "in-head": ((R + 2,), (D // 2, D // 2), (D // 2, D // 4, D // 4)),
}


@pytest.fixture(params=FORMS)
def given(request):
    """Projections, norms of queries and of keys, tables; two packs, whose positions differ."""
    draw = torch.Generator().manual_seed(0)
    heads, widths, axes = FORMS[request.param]
    projections = [torch.randn(S, B, G, count, D, generator=draw) for count in heads]
    norms = [torch.rand(width, generator=draw) + 0.5 for _ in range(2) for width in widths]
    rotary = NativeRotary.from_positions(torch.randint(0, 99, (B, S, 3), generator=draw), axes, 1e6, 1e4)
    return [*projections, *norms], rotary


def run(function, tensors, last, dtype):
    """Heads, and the gradients of everything towards a fixed direction."""
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    projections, norms = [x for x in tensors if x.dim() > 1], [x for x in tensors if x.dim() == 1]
    heads = function(projections, norms[: len(norms) // 2], norms[len(norms) // 2 :], last, EPS)
    draw = torch.Generator().manual_seed(1)
    towards = [torch.randn(part.shape, generator=draw).to(dtype) for part in heads]
    return [*heads, *torch.autograd.grad(heads, tensors, towards)]


def written_out(projections, query_norms, key_norms, tables, eps):
    """The definition, head by head: norm, half-rotation as in Qwen3, [t | h | w]."""

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotated(x, table):
        cos, sin = (torch.cat((half, half), dim=-1)[:, :, 0] for half in table)  # over groups
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def head(number, weights):
        all_channels = torch.cat([projection[..., number, :] for projection in projections], dim=-1)
        if len(projections) == 2:
            t, h, w = all_channels.split((D, D // 2, D // 2), dim=-1)
            axes = norm(t, weights[0]), norm(h, weights[1]), norm(w, weights[2])
        else:
            t, hw = all_channels.split((D // 2, D // 2), dim=-1)
            hw = norm(hw, weights[1])
            axes = norm(t, weights[0]), hw[..., : D // 4], hw[..., D // 4 :]
        return torch.cat([rotated(*pair) for pair in zip(axes, tables, strict=True)], dim=-1)

    def groups(numbers, weights):
        heads = [head(number, weights) for number in numbers]  # each [S, B, G, channels]
        return torch.stack(heads, dim=3).flatten(2, 3)

    return groups(range(R), query_norms), groups([R], key_norms), projections[0][:, :, :, R + 1]


def test_part_by_part_and_at_once_are_the_definition(given):
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
