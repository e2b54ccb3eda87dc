"""Lets Inductor and Triton compile for a GPU that this machine does not have; nothing can be loaded or launched.

For a process that does nothing else: `install()` changes what `torch.cuda` and Triton's driver say of the device.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

# Read on import: compile in this process.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHDYNAMO_DISABLE": "0"}

import torch
import torch._inductor.config as inductor_config
import torch._inductor.runtime.triton_heuristics as triton_heuristics
import torch.nn.attention.flex_attention as flex
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget

from neo_megatron.megatron_compat.cpu_platform import on_cpu

Properties = Any  # as `torch.cuda.get_device_properties` returns them


class AbsentGpu:
    """The device of this process, and what is compiled for it.

    Attributes:
        properties: of the device; changes with `use`.
        kernels: called with each kernel that Triton has compiled.
        modules: called with each module of kernels that Inductor has written, as Python source.
    """

    def __init__(self) -> None:
        self.properties: Properties = None
        self.kernels: Callable[[Any], None] = lambda kernel: None
        self.modules: Callable[[str], None] = lambda source: None
        self._seen = False

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.properties.major + self.properties.minor, 32)

    def use(self, properties: Properties) -> None:
        """Changes the device; what is remembered of the one before is forgotten."""
        self.properties = properties
        torch._dynamo.reset()
        torch._inductor.utils.clear_caches()

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Makes the device available to Inductor. Not while tracing: autograd would ask the driver."""
        self._seen = True
        try:
            yield
        finally:
            self._seen = False

    def is_available(self) -> bool:
        # Fake tensors initialise CUDA where it is available.
        return self._seen and "fake_tensor" not in sys._getframe(1).f_code.co_filename


class _Driver:
    """The questions of Inductor and Triton to a driver before anything is launched."""

    launcher_cls = None

    def __init__(self, gpu: AbsentGpu) -> None:
        self._gpu = gpu
        self.utils = SimpleNamespace(get_device_properties=self._properties)

    def _properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._gpu.properties.shared_memory_per_block_optin,
            "multiprocessor_count": self._gpu.properties.multi_processor_count,
            "max_num_regs": self._gpu.properties.regs_per_multiprocessor,
            "warpSize": self._gpu.properties.warp_size,
        }

    def get_current_target(self) -> GPUTarget:
        return self._gpu.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def install() -> AbsentGpu:
    """Changes this process; call `use` of what it returns before anything is compiled.

    Raises:
        RuntimeError: this machine has a GPU, whose driver would be asked in part.
    """
    if not on_cpu():
        raise RuntimeError("absent_gpu: this machine has a GPU; hide it with CUDA_VISIBLE_DEVICES=")
    gpu = AbsentGpu()
    for name, value in {
        "is_available": gpu.is_available,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: gpu.properties,
        "get_device_capability": lambda *_: (gpu.properties.major, gpu.properties.minor),
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "set_device": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }.items():
        setattr(torch.cuda, name, value)
    properties = staticmethod(lambda *_: gpu.properties)
    CudaInterface.get_device_properties = CudaInterface.Worker.get_device_properties = properties
    CudaInterface.get_compute_capability = staticmethod(lambda *_: gpu.target.arch)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.current_device = staticmethod(lambda: 0)
    CudaInterface.exchange_device = CudaInterface.maybe_exchange_device = staticmethod(lambda _: 0)
    CudaInterface.get_raw_stream = torch._C._cuda_getCurrentRawStream = staticmethod(lambda *_: 0)
    triton.runtime.driver.set_active(_Driver(gpu))
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor_config.use_static_triton_launcher = False

    compile_for_driver = triton.compile

    def compile_for_gpu(source: Any, target: Any = None, options: Any = None, **keywords: Any) -> Any:
        kernel = compile_for_driver(source, target=gpu.target, options=options, **keywords)
        gpu.kernels(kernel)
        return kernel

    triton.compile = triton_heuristics.triton.compile = compile_for_gpu
    triton_heuristics.TritonCompileResult.make_launcher = _no_launcher

    write = PyCodeCache.write

    def write_and_show(source_code: str, *arguments: Any, **keywords: Any) -> Any:
        if "async_compile.wait" in source_code:
            gpu.modules(source_code)
        return write(source_code, *arguments, **keywords)

    PyCodeCache.write = staticmethod(write_and_show)

    # As on a GPU: on a CPU, where this is traced, it refuses gradients and keeps no sums for the backward.
    flex._validate_device = lambda *_: None
    apply_options = flex._apply_kernel_options
    flex._apply_kernel_options = lambda *given, **keywords: (
        apply_options(*given, **keywords) | {"OUTPUT_LOGSUMEXP": True}
    )
    return gpu


def _no_launcher(result: Any) -> Any:
    """Stands for the function that loads and starts a kernel, and says nothing of its size."""

    def launch(*_: Any, **__: Any) -> None:
        raise RuntimeError("absent_gpu: kernels are compiled here, not launched")

    facts = {"config": result.config, "bin": result.kernel, "cache_hash": None, "store_cubin": False}
    launch.__dict__.update(facts, n_regs=0, n_spills=0, shared=0, def_args=[], call_args=[])
    return launch
