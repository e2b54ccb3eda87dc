"""A GPU that is not there: tensors on it have a device, a shape and a size, but no values.

`install()` makes torch.cuda answer for an H100. Within `simulation()` tensors are torch's fake tensors, which on a
machine without a driver have one obstacle: autograd asks the driver for the streams of their device. So to C++ they
are on `meta`, to Python on `cuda:0`. Bytes that they take and collectives are counted. Where the host would wait
for the device, HostSync is raised.

For a process that does nothing else. torch's private names are used; `test_whole_steps.py` fails if they change.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # before anything is replaced: it looks functions up by identity
import torch._subclasses.fake_tensor as fake_tensors
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

TESTS = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85 * 10**9,
    shared_memory_per_block_optin=227 * 1024,
)  # fmt: skip
_TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}
_VALUES = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}


class HostSync(RuntimeError):
    """The host would wait for the device."""


def _wait(*_: Any) -> None:
    raise HostSync("synchronize")


class _Stream:
    """A stream; an event of it is one, too."""

    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    wait = record = wait_stream = wait_event = _nothing

    def record_event(self, *_: Any) -> "_Stream":
        return self

    synchronize = _wait


def install() -> None:
    """Makes torch.cuda answer. Before anything of Megatron is imported."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 8,
        "set_device": lambda *_: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: H100,
        "get_device_capability": lambda *_: (H100.major, H100.minor),
        "get_device_name": lambda *_: H100.name,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": _wait,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_, **__: torch.empty(0),
        "set_rng_state": lambda *_, **__: None,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, answer)
    torch.cuda.Stream = torch.cuda.Event = _Stream
    fake_tensors.init_gpu_context = lambda device: None


class Gpu(TorchDispatchMode):
    """Counts what happens on the device.

    Attributes:
        bytes, peak: taken now, and at most so far.
        sent: bytes by the operation and the name of its process group; those of a ring, of one rank.
        stepping: whether the host must not wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.sent: Counter[tuple[str, str]] = Counter()
        self.stepping = False
        self._sizes: dict[int, int] = {}
        self._shared: dict[int, torch.UntypedStorage] = {}
        self._within = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        space, name = operation.name().split(".")[0].split("::")
        if space == "c10d":
            return self._collective(operation, name, args)
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if target is not None and target.type == "meta":  # said by C++
            kwargs["device"] = target = CUDA
        on_gpu = any(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in args)
        if self.stepping and on_gpu:
            to_host = name == "_to_copy" and target is not None and target.type == "cpu"
            if name in _VALUES or (to_host and not kwargs.get("non_blocking")):
                raise HostSync(name)
        if name == "_to_copy" and target == CUDA and isinstance(args[0], FakeTensor):
            args[0].constant = None  # torch would copy the number it knows
        out = operation(*args, **kwargs)
        self.take(out)
        return out

    def take(self, made: Any) -> None:
        """Counts tensors, unless they are inside of a kernel."""
        for tensor in () if self._within else tree_leaves(made):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    weakref.finalize(storage, self._free, storage._cdata)
                    self._sizes[storage._cdata] = 0
                self.resize(storage)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Counts the bytes that a storage has now."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes and key not in self._shared:
            self.bytes += size - self._sizes[key]
            self._sizes[key] = size
            self.peak = max(self.peak, self.bytes)

    def share(self, tensor: Tensor, other: Tensor) -> None:
        """The memory of a tensor that was freed becomes that of another."""
        self._shared[tensor.untyped_storage()._cdata] = other.untyped_storage()

    def _free(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
        self._shared.pop(key, None)

    def as_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs as one kernel: only what it returns takes memory."""

        def kernel(*args: Any, **kwargs: Any) -> Any:
            self._within += 1
            try:
                out = function(*args, **kwargs)
            finally:
                self._within -= 1
            self.take(out)
            return out

        return kernel

    def _collective(self, operation, name: str, args: tuple) -> Any:
        group = next(ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args[:2]]
        part = (group.size() - 1) / group.size()
        if "reduce_scatter" in name or "alltoall" in name:
            sent = sizes[1] * part
        elif "allgather" in name:
            sent = sizes[0] * part
        elif name == "allreduce_":
            sent = sizes[0] * 2 * part
        else:
            sent = sizes[0] * (name == "send")
        self.sent[name, group.group_name] += sent
        work = FakeWork().boxed()
        return work if len(operation._schema.returns) == 1 else (args[0], work)


@contextlib.contextmanager
def simulation(gpu: Gpu) -> Iterator[None]:
    """Everything in it happens on the simulated device, backwards in the calling thread."""
    make, tensor_to, new_tensor = Tensor._make_subclass, Tensor.to, torch.tensor

    def make_subclass(cls, elem, requires_grad=False, **keywords):
        return make(cls, elem, requires_grad) if cls is FakeTensor else make(cls, elem, requires_grad, **keywords)

    def to(tensor, *args, **keywords):
        target = keywords.get("device", args[0] if args else None)
        if isinstance(tensor, FakeTensor) or not isinstance(target, str | torch.device):
            return tensor_to(tensor, *args, **keywords)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=target)  # a copy of a tensor of the host

    def tensor(data, *, dtype=None, device=None, **keywords):
        made = new_tensor(data, dtype=dtype, **keywords)
        if device is None or torch.device(device).type == "cpu":
            return made
        if gpu.stepping:
            raise HostSync("torch.tensor copies numbers from memory that is not pinned")
        return torch.empty(made.shape, dtype=made.dtype, device=CUDA)

    Tensor._make_subclass = staticmethod(make_subclass)
    Tensor.to, torch.tensor = to, tensor
    Tensor.cuda = lambda tensor, *_, **__: tensor.to(CUDA)
    Tensor.is_pinned = lambda *_: True
    FakeTensor.is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    FakeTensor.type = lambda tensor: f"torch.cuda.{_TYPES.get(tensor.dtype, tensor.dtype)}"
    resize = torch.UntypedStorage.resize_

    def resize_(storage, size):
        resize(storage, size)
        gpu.resize(storage)

    torch.UntypedStorage.resize_ = resize_
    torch.UntypedStorage.data_ptr = lambda storage: storage._cdata  # an identity, too
    torch.nn.Module.cuda = lambda module, *_: _move(module, gpu)
    torch.nn.Module.bfloat16 = _round
    with FakeTensorMode(allow_non_fake_inputs=True), gpu, torch.autograd.set_multithreading_enabled(False):
        yield


def _move(module: torch.nn.Module, gpu: Gpu) -> torch.nn.Module:
    # Module's own way swaps two tensors, which fake ones do not allow.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.fake_device = CUDA
        gpu.take(tensor)
    return module


def _round(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dtype == torch.float32:
                rounded = torch.nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)
                for key, value in vars(parameter).items():  # as sequence_parallel
                    vars(rounded).setdefault(key, value)
                setattr(part, name, rounded)
    return module


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the host, which works on real tensors."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return real
