"""RMSNorm on a CPU: its own backward against PyTorch's composition."""

import pytest
import torch

from neo_megatron.model.cpu_kernels.rms_norm import CpuRMSNorm


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads as they lie in a projection, with channels of others between them; and a weight."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 3, 24, generator=draw).to(dtype)[..., :8].requires_grad_()
    return x, torch.randn(8, generator=draw).to(dtype).requires_grad_()


def test_gradients_are_those_of_the_function():
    x, weight = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: CpuRMSNorm.apply(*given, 1e-6), (x, weight))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_equals_pytorch(dtype, tolerance):
    x, weight = inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = torch.rms_norm(exact[0], (8,), exact[1], 1e-6)
    actual = CpuRMSNorm.apply(x, weight, 1e-6)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    towards = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(actual, (x, weight), towards.to(dtype))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, towards), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, atol=5 * tolerance, rtol=tolerance)


def test_a_row_of_zeros_has_a_gradient():
    """Padding, and keys that start at zero: the slope there is 1 / sqrt(eps)."""
    x = torch.zeros(1, 4, requires_grad=True)
    CpuRMSNorm.apply(x, torch.ones(4), 1e-6).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 4), 1e3))
