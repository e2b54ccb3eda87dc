"""Megatron's patched training step; `tests/distributed/test_bad_numbers.py` and `test_flags.py` run it."""

import pytest
import torch

from neo_megatron.megatron_compat import cpu_platform


@pytest.mark.parametrize("other", [0, 1])
def test_a_signal_of_any_rank_is_one_number(megatron, monkeypatch, other):
    """Whatever the number of ranks: one reduction, and one element to wait for."""
    cpu_platform.install_training()
    from megatron.training.dist_signal_handler import DistributedSignalHandler

    from neo_megatron.megatron_compat import steps

    reduced = []

    def all_reduce(tensor, op):
        reduced.append(op)
        tensor.clamp_(min=other)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    with DistributedSignalHandler() as handler:
        assert steps._signals_received(handler) == [bool(other)]
        handler._signal_received = True
        assert steps._signals_received(handler) == [True]
    assert reduced == [torch.distributed.ReduceOp.MAX] * 2


@pytest.mark.parametrize(("norm", "expected"), [(1.0, 0.25), (8.0, 0.125)])
def test_clipping_completes_the_scaling(megatron, monkeypatch, norm, expected):
    """Gradients of 1 are to be multiplied by 1/4, and with a norm of 8 afterwards clipped to 4."""
    cpu_platform.install_training()
    from neo_megatron.megatron_compat import steps

    steps.begin(True, lambda norm: None)
    steps._gradients.factor = 0.25
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    frozen = torch.nn.Parameter(torch.zeros(3))
    steps._clip([weight, frozen], 4.0, norm)
    torch.testing.assert_close(weight.grad, torch.full((3,), expected))
    assert frozen.grad is None
