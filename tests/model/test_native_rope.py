"""Rotary tables stay exact where bfloat16 would not, whatever the dtype of the model."""

import pytest
import torch

from neo_megatron.model.native_rope import NativeRotary


def test_angles_are_right_at_far_positions():
    positions = torch.tensor([[[16384, 8191, 4097]]], dtype=torch.int32)
    rotary = NativeRotary.from_positions(positions, (128, 64, 64), theta_t=1e6, theta_hw=1e4)
    for table, position, width, theta in (
        (rotary.t, 16384, 128, 1e6),
        (rotary.h, 8191, 64, 1e4),
        (rotary.w, 4097, 64, 1e4),
    ):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = position * frequency
        # float32 holds an angle of 16384 to 2 ** -10.
        torch.testing.assert_close(table.cos.flatten().double(), angle.cos(), atol=2e-3, rtol=0)
        torch.testing.assert_close(table.sin.flatten().double(), angle.sin(), atol=2e-3, rtol=0)
        assert table.cos.dtype == torch.float32


def rotated_pairs(x, position, theta):
    """Half-rotation in float64 as complex numbers: the pair (i, i + D/2) times ``exp(i * position * frequency)``."""
    width = x.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(1j * position[..., None, None, None] * frequency)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_every_part_turns_by_its_own_position(dtype, tolerance):
    """Values and gradients, of heads that are views into a projection."""
    draw = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 30, (2, 5, 3), generator=draw)
    rotary = NativeRotary.from_positions(positions, (16, 8, 8), theta_t=1e6, theta_hw=1e4)
    parts = [torch.randn(5, 2, 3, 4, 16, generator=draw).to(dtype)[..., :width] for width in (16, 8, 8)]
    exact = [part.double().requires_grad_() for part in parts]
    expected = torch.cat(
        [
            rotated_pairs(part, positions[..., axis].t(), theta)
            for axis, (part, theta) in enumerate(zip(exact, (1e6, 1e4, 1e4), strict=True))
        ],
        dim=-1,
    ).flatten(2, 3)
    actual = rotary.rotate(*(part.requires_grad_() for part in parts))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    towards = torch.randn(expected.shape, dtype=torch.float64, generator=draw).to(dtype)
    wanted = torch.autograd.grad(expected, exact, towards.double())
    for gradient, exact in zip(torch.autograd.grad(actual, parts, towards), wanted, strict=True):
        torch.testing.assert_close(gradient.double(), exact, atol=tolerance, rtol=tolerance)


def test_a_bfloat16_model_keeps_float32_tables(build, text_inputs):
    model = build().bfloat16()
    seen = []
    attention = model.decoder.layers[0].self_attention
    original = attention.query_key_value
    attention.query_key_value = lambda hidden, rotary, *heads: seen.append(rotary) or original(hidden, rotary, *heads)
    model(**text_inputs([1, 2, 3, 4], positions=12345))
    (rotary,) = seen
    exact = NativeRotary.from_positions(torch.full((1, 4, 3), 12345), (16, 8, 8), 1e6, 1e4)
    for axis in ("t", "h", "w"):
        assert torch.equal(getattr(rotary, axis).cos, getattr(exact, axis).cos)


def test_tables_are_made_once_per_micro_batch(build, text_inputs, monkeypatch):
    from neo_megatron.model import neo_model

    calls = []
    original = NativeRotary.from_positions
    monkeypatch.setattr(
        neo_model.NativeRotary, "from_positions", classmethod(lambda cls, *a: calls.append(1) or original(*a))
    )
    model = build()
    model(**text_inputs([1, 2, 3, 4]))
    assert len(calls) == 1
