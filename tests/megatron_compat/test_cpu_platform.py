"""Replacements for a GPU: placements on cuda, the fused optimizer, the gradient of SwiGLU."""

import os
import subprocess
import sys

import pytest
import torch

from neo_megatron.megatron_compat import cpu_platform

pytestmark = pytest.mark.skipif(not cpu_platform.on_cpu(), reason="with a GPU nothing is patched")


FORKS = """
import os
import torch
for gpu, own in ((True, None), (False, None), (True, "8")):
    if os.fork() == 0:
        if own:
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = own
        torch.cuda.is_available = lambda: gpu
        import neo_megatron.megatron_compat.cpu_platform
        import torch._inductor.config as inductor
        print(inductor.compile_threads, os.environ.get("TORCHDYNAMO_DISABLE"), flush=True)
        os._exit(0)
    os.wait()
"""


def test_compiling_is_switched_off_without_a_gpu_only_and_has_few_processes():
    """With a GPU, without one, and with a number of the user's own. PyTorch alone says whether there is a GPU."""
    names = ("TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_COMPILE_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["4 None", "4 1", "8 None"], done.stderr


def test_cuda_means_cpu(megatron):
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.empty_like(torch.ones(2), device=torch.device("cuda", 0)),
        torch.tensor([1], device="cuda", pin_memory=True),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda", torch.float64),
        torch.ones(2).to(device="cuda"),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2, device="cuda").weight,
    ):
        assert tensor.device.type == "cpu"
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"  # as Megatron's optimizers ask for it
    assert torch.ones(2).type(torch.int32).dtype == torch.int32


def test_the_meta_device_is_unchanged(megatron):
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
        assert torch.ones(2, device="cpu").type() == "torch.cuda.FloatTensor"


def test_adam_is_adamw(megatron):
    """Three steps, with weight decay on one of two groups."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=draw), torch.randn(5, generator=draw)]
    gradients = [[torch.randn(p.shape, generator=draw) for p in start] for _ in range(3)]
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    results = []
    for kind in (cpu_platform.Adam, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, **settings)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameters)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_gradient_of_swiglu(megatron):
    from megatron.core.fusions.fused_bias_swiglu import SwiGLUFunction

    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: SwiGLUFunction.apply(x, False, False), (x,))


def test_a_gpu_without_fused_optimizers_has_the_same_adam():
    """Megatron's distributed optimizer cannot load what it saves over torch's own."""
    lines = (
        "from neo_megatron.megatron_compat import cpu_platform",
        "cpu_platform.on_cpu = lambda: False",
        "cpu_platform.install()",
        "from megatron.core import optimizer",
        "assert optimizer.Adam is cpu_platform.Adam and not optimizer.USING_PYTORCH_OPTIMIZER",
        "assert optimizer.distrib_optimizer.HAVE_APEX_OR_TE and optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
