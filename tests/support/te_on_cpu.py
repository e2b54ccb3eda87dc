"""Transformer Engine without a GPU: its modules are built, and run with plain arithmetic in place of its kernels.

Everything but products and norms is its own code: what it saves, gathers and sums, and which gradients it passes on.
Not for FP8. Import after `cpu_platform.install()`.
"""

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import torch
import transformer_engine.pytorch.module._common as te_common
import transformer_engine.pytorch.module.base as te_base
import transformer_engine.pytorch.module.layernorm_linear as te_layernorm_linear
import transformer_engine.pytorch.module.linear as te_linear
import transformer_engine.pytorch.ops.basic.rmsnorm as te_rmsnorm
from torch import Tensor


@contextlib.contextmanager
def pretended_hopper() -> Iterator[None]:
    """torch.cuda answers the questions that Transformer Engine asks while it builds modules."""
    properties = types.SimpleNamespace(
        name="Hopper", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_, **__: (9, 0),
        "get_device_properties": lambda *_, **__: properties,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Its linear layers and RMSNorms run on a CPU, forward and backward."""
    prepare = te_base.TransformerEngineBaseModule.prepare_forward

    def prepare_forward(*arguments, **keywords):
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            return prepare(*arguments, **keywords)

    tex = {"rmsnorm_fwd": _norm, "rmsnorm_bwd": _norm_backward}
    patches = [
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(te_base.TransformerEngineBaseModule, "prepare_forward", prepare_forward),
        mock.patch.object(te_linear, "general_gemm", _product),
        mock.patch.object(te_layernorm_linear, "general_gemm", _product),
        mock.patch.multiple(te_common.tex, **tex),
        mock.patch.multiple(te_layernorm_linear.tex, **tex),
        mock.patch.multiple(te_rmsnorm, **tex),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _product(a: Tensor, b: Tensor, *, layout: str = "TN", out: Tensor | None = None, accumulate=False, **_) -> tuple:
    """cuBLAS's column-major conventions, seen row-major: "TN" is x W^T, "NN" dy W and "NT" dy^T x."""
    a = a.flatten(0, -2) if layout[0] == "N" else a.flatten(0, -2).T
    b = b.flatten(0, -2) if layout[1] == "N" else b.flatten(0, -2).T
    value = b @ a
    if out is not None:
        value = out.add_(value) if accumulate else out.copy_(value)
    return value, None, None, None


def _norm(x: Tensor, weight: Tensor, eps: float, *_settings) -> tuple[Tensor, None, Tensor]:
    inverse = (x.square().mean(-1) + eps).rsqrt()
    return x * inverse[:, None] * weight, None, inverse


def _norm_backward(d_out: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, *_settings) -> tuple[Tensor, Tensor]:
    unit = x * inverse[:, None]
    d_unit = d_out * weight
    return inverse[:, None] * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)), (d_out * unit).sum(0)
