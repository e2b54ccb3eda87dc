"""Rotary tables stay exact where bfloat16 would not, whatever the dtype of the model."""

import torch

from neo_megatron.model.native_rope import NativeRotary


def test_angles_are_right_at_far_positions():
    positions = torch.tensor([[[16384, 8191, 4097]]], dtype=torch.int32)
    rotary = NativeRotary.from_positions(positions, head_dim=128, theta_t=1e6, theta_hw=1e4)
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


def test_a_bfloat16_model_keeps_float32_tables(build, text_inputs):
    model = build().bfloat16()
    seen = []
    attention = model.decoder.layers[0].self_attention
    original = attention.query_key_value
    attention.query_key_value = lambda hidden, rotary: seen.append(rotary) or original(hidden, rotary)
    model(**text_inputs([1, 2, 3, 4], positions=12345))
    (rotary,) = seen
    exact = NativeRotary.from_positions(torch.full((1, 4, 3), 12345), 16, 1e6, 1e4)
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
