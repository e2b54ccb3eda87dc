"""Runs Megatron on a machine without a GPU: patches make "cuda" mean "cpu".

A program calls `install()` before it imports `megatron.core`, or `install_training()` before it imports
`megatron.training` as well. With a GPU both patch nothing but what is marked "on a GPU too".

Every patched name is looked up first, and the versions are checked: another version of torch or Megatron-Core ends in
one sentence instead of training wrongly. `tests/distributed` checks that the patched stack trains correctly.
"""

import ctypes
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.utils._device import _device_constructors

from neo_megatron.megatron_compat.hooks import MEGATRON_VERSION, require_lines

# Megatron decorates small functions with torch.compile when it is imported; on a CPU each costs a minute of C++
# building. PyTorch is asked, because a GPU has other device files under WSL2, and may be hidden.
if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Processes that compile kernels: PyTorch would start up to 32 for each of a machine's eight ranks. Read when it first
# compiles.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")

TORCH_VERSION = "2.11"


def on_cpu() -> bool:
    """Whether this process trains without a GPU. Asks the driver, because `install` changes torch.cuda."""
    return not torch.cuda.is_available()


def argument_defaults() -> dict[str, Any]:
    """Megatron arguments that a CPU needs, so that no user has to pass them."""
    if not on_cpu():
        return {}
    return {
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        # Fused kernels of apex and Transformer Engine.
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,
        "masked_softmax_fusion": False,
    }


# Functions of torch that create a tensor on a device.
_FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)


def _cuda_means_cpu() -> None:
    """Turns every placement on cuda into one on the CPU.

    Only functions that place a tensor are wrapped: a `TorchFunctionMode` would see every call of torch, which costs a
    small model a fifth of its time.
    """
    # The meta device's context knows factories by identity, from a list that it makes on first use.
    _device_constructors()
    for name in _FACTORIES:
        _patch(torch, name, _on_cpu(getattr(torch, name)))
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    @wraps(tensor_to)
    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (torch.device("cpu"), *args[1:])
        return tensor_to(self, *args, **_cpu_keywords(kwargs))

    @wraps(tensor_type)
    def type_(self, *args, **kwargs):
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        # Megatron's optimizers sort parameters by the name "torch.cuda.FloatTensor". Under a mode, such as that of
        # `torch.device("meta")`, this function is called again from inside.
        name = tensor_type(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    _patch(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _patch(torch.Tensor, "to", to)
    _patch(torch.Tensor, "type", type_)


def _gather_uneven(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(even)
    def gather(part, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return even(part, group, output_split_sizes, use_global_buffer)
        padded = part.new_zeros(max(output_split_sizes), *part.shape[1:])
        padded[: len(part)] = part
        gathered = padded.new_empty(group.size() * len(padded), *padded.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        of_ranks = gathered.split(len(padded))
        return torch.cat([rows[:count] for rows, count in zip(of_ranks, output_split_sizes, strict=True)])

    return gather


def _scatter_uneven(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(even)
    def scatter(complete, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return even(complete, group, input_split_sizes, use_global_buffer)
        summed = complete.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed.split(input_split_sizes)[group.rank()].clone()

    return scatter


def _numbers_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _PastEvent:
    """An event that has happened: a CPU runs no streams."""

    def synchronize(self) -> None:
        pass

    def wait(self) -> None:
        pass


class _Cpu(str):
    """The current device: "cpu" where tensors are placed, number 0 in names such as f"cuda:{device}"."""

    def __format__(self, _: str) -> str:
        return "0"


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(factory)
    def on_cpu(*args, **kwargs):
        return factory(*args, **_cpu_keywords(kwargs))

    return on_cpu


def _cpu_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    if _is_cuda(kwargs.get("device")):
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):  # pinned memory needs a GPU
        kwargs["pin_memory"] = False
    return kwargs


class Adam(torch.optim.Optimizer):
    """AdamW that keeps its state as the FusedAdam of apex and Transformer Engine do: `step` per group, not per tensor.

    Over `torch.optim.AdamW`, which Megatron takes where neither is installed, its distributed optimizer saves
    checkpoints that it cannot load.
    """

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True, capturable=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.update = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            first, second = ([self.state[p][k] for p in parameters] for k in ("exp_avg", "exp_avg_sq"))
            # One tensor each, because torch counts in them, and on their device.
            step = float(group.get("step", 0))
            steps = [torch.full((), step, device=p.device) for p in parameters]
            self.update(
                parameters,
                [p.grad for p in parameters],
                first,
                second,
                [],
                steps,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                fused=True,
            )
            group["step"] = group.get("step", 0) + 1


def _keep_freed_memory() -> None:
    """Keeps memory that a step frees for the next one, as the allocator of a GPU does.

    glibc would return it to the system, and every page would be faulted in again: 7 % of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)  # separate mappings, as of large tensors, are always returned


def _multi_tensor_scale(_chunk_size, _overflow, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """Megatron scales gradients in place: both lists are the same."""
    sources, destinations = tensor_lists
    for source, destination in zip(sources, destinations, strict=True):
        torch.mul(source, scale, out=destination)


def _swiglu_back(d_out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of ``silu(gate) * up`` with respect to ``x = [gate | up]``."""
    gate, up = x.chunk(2, dim=-1)
    d_x = torch.empty_like(x)
    d_gate, d_up = d_x.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), d_out, out=d_up)
    torch.mul(d_out, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return d_x


@cache
def install() -> None:
    """Prepares torch and `megatron.core`.

    Raises:
        RuntimeError: another version of torch or Megatron-Core is installed than this module was written for.
    """
    if not on_cpu():
        _replace_adam_of_torch()
        return
    _check_versions()
    _cuda_means_cpu()
    _keep_freed_memory()
    # torch.cpu is torch's own stand-in: current_device() is "cpu", streams do nothing. Wrapped, because torch refuses
    # one function object under two names.
    _patch(torch.cuda, "current_device", lambda: _Cpu(torch.cpu.current_device()))
    for name in ("device_count", "set_device", "synchronize", "current_stream", "stream"):
        stand_in = getattr(torch.cpu, name)
        _patch(torch.cuda, name, lambda *args, _stand_in=stand_in, **kwargs: _stand_in(*args, **kwargs))
    # A class, because libraries annotate with it; the experts' dispatcher waits for an event.
    _patch(torch.cuda, "Stream", type("Stream", (torch.cpu.Stream,), {"record_event": lambda stream: _PastEvent()}))
    _patch(torch.cuda, "empty_cache", lambda: None)
    # The CPU's generator is "the" generator of the device.
    for module in (torch.cuda, torch.cuda.random):
        _patch(module, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
        _patch(module, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    _patch(torch.cuda, "manual_seed", torch.manual_seed)

    # Megatron warns in ten places that apex and Transformer Engine are absent, which is intended here.
    for message in ("Transformer Engine and Apex are not", "Apex is not installed", "Only transformer-engine"):
        warnings.filterwarnings("ignore", message=message)
    # It would also warn, at every random initialisation, that the two generators which are one here changed together.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

    import megatron.core.fusions.fused_bias_swiglu as fused_bias_swiglu
    import megatron.core.optimizer as optimizer
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # Gloo exchanges parts of one size only; the tokens of expert-tensor-parallel ranks differ in number.
    _patch(mappings, "_gather_along_first_dim", _gather_uneven(mappings._gather_along_first_dim))
    _patch(mappings, "_reduce_scatter_along_first_dim", _scatter_uneven(mappings._reduce_scatter_along_first_dim))
    # Leaves tensors that are on the CPU already as tensors; sizes of an exchange must be numbers.
    _patch(token_dispatcher, "maybe_move_tensor_to_cpu", _numbers_on_cpu)
    # Writes into torch.cuda.default_generators, which are absent.
    _patch(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # Tests `fp8 is not None` over a default of False, and would then need Transformer Engine.
    if random.CheckpointWithoutOutput.__init__.__defaults__ != (False,):
        raise _changed("CheckpointWithoutOutput.__init__'s default")
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    _replace_adam_of_torch()
    # Stand-ins for kernels that are fused on a GPU; Megatron's own make several passes over new tensors.
    _patch(optimizer.clip_grads, "multi_tensor_scale_impl", _multi_tensor_scale)
    _patch(fused_bias_swiglu, "swiglu_back", _swiglu_back)


def _replace_adam_of_torch() -> None:
    """Makes `Adam` Megatron's optimizer, on a GPU too, where neither apex nor Transformer Engine is installed."""
    import megatron.core.optimizer as optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        _patch(optimizer, "Adam", Adam)
        _patch(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        _patch(optimizer.distrib_optimizer, "HAVE_APEX_OR_TE", True)
        _patch(optimizer.distrib_optimizer, "USING_APEX_OPTIMIZER", True)


def require() -> None:
    """Raises RuntimeError, with the remedy, where Megatron would run on a CPU without `install`."""
    if on_cpu() and not install.cache_info().currsize:
        raise RuntimeError(
            "no GPU: call neo_megatron.megatron_compat.cpu_platform.install() before importing megatron.core"
        )


@cache
def install_training() -> None:
    """Prepares `megatron.training`, on top of `install`."""
    install()
    import megatron.core.datasets.utils as dataset_utils

    # On a GPU too: runs `make` in site-packages, but the wheel ships the compiled helper and no Makefile.
    _patch(dataset_utils, "compile_helpers", lambda: None)
    from megatron.training import arguments, training

    from neo_megatron.megatron_compat import fsdp, layer_wise, loading, optimizer_saves, saving

    require_lines(optimizer_saves.PATCHED, optimizer_saves.LINES)
    for patched, lines in (fsdp.LINES | layer_wise.LINES).items():
        require_lines(patched, lines)
    for module in (loading, saving, optimizer_saves, fsdp, layer_wise):
        for owner, name, value in module.PATCHES:
            _patch(owner, name, value)
    if not on_cpu():
        return
    # Its mesh is of GPUs, whatever the machine has.
    _patch(fsdp.mcore_fsdp_adapter, "DeviceMesh", fsdp.CpuMesh)
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # Copies from the GPU before training continues; on a CPU it copies nothing, and later steps would be saved.
    _patch(FileSystemWriterAsync, "preload_tensors", staticmethod(copy_before_writing))

    # Reads device properties. From 10 on Megatron also drops its rule about CUDA_DEVICE_MAX_CONNECTIONS.
    _patch(arguments, "get_device_arch_version", lambda: 10)
    # Asserts a GPU unless told not to.
    _patch(training, "initialize_megatron", partial(training.initialize_megatron, allow_no_cuda=True))


def copy_before_writing(write_buckets: list, non_blocking: bool = True) -> list:
    """Copies for an asynchronous save, which no later step changes. Public, so that its process finds it."""
    return [
        (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, key, (data, tensors) in write_buckets
    ]


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _patch(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise _changed(f"{owner.__name__}.{name}")
    setattr(owner, name, value)


def _check_versions() -> None:
    megatron = importlib.metadata.version("megatron-core")
    if megatron != MEGATRON_VERSION or not torch.__version__.startswith(TORCH_VERSION + "."):
        raise _changed(f"megatron-core {megatron} with torch {torch.__version__}")


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"cannot run Megatron on a CPU: {what} is not what neo_megatron was written for; "
        f"pip install 'megatron-core=={MEGATRON_VERSION}' 'torch=={TORCH_VERSION}.*'"
    )
