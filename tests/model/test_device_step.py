"""A step never makes the host wait for the device: proved on tensors without values.

Tensors on `meta` have a device and a shape and no values. Whatever asks for a value, or for a shape that depends on
values, raises there, and this is what a GPU would have to be waited for. The model is told that they are on a GPU, so
that it takes that path; the kernels themselves are stand-ins.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo_megatron.model import core_attention
from neo_megatron.model.gpu_kernels import norm_rotary
from neo_megatron.model.loss import WeightedLoss
from neo_megatron.model.micro_batch import to_device
from neo_megatron.model.patch_embedding import normalise

LENGTH, PACKS, IMAGE_TOKENS, TRAINED = 256, 2, 40, 100


class OnDevice(TorchDispatchMode):
    """Refuses operations with a tensor of the host, copies among them: from memory that is not pinned they wait."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if devices - {"meta"}:
            raise AssertionError(f"{operation} works on {devices}")
        return out


class NoNumbers(TorchFunctionMode):
    """Refuses tensors made of Python's numbers, which are made on the host and copied."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tensor", "as_tensor", "asarray", "new_tensor", "from_numpy"):
            raise AssertionError(f"{function} copies numbers to the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_device(monkeypatch):
    """Tensors say that they are on a GPU; collectives of one rank do nothing; attention is a sum that has its shape."""

    def kernel(query, key, value, **_):
        return query[..., : value.shape[-1]] + (key[..., : value.shape[-1]] + value).mean(dim=1, keepdim=True)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(core_attention, "_compiled_flex_attention", lambda: kernel)
    monkeypatch.setattr(core_attention, "_options_of", lambda *_: {})
    for launch in ("launch_forward", "launch_backward"):
        monkeypatch.setattr(norm_rotary, launch, lambda *_: None)

    @contextmanager
    def both():
        with OnDevice(), NoNumbers():
            yield

    return both


def inputs() -> dict[str, torch.Tensor]:
    """A micro-batch, as `model_inputs` gives it to a model of one rank."""
    shapes = {
        "positions_thw": (torch.int32, PACKS, LENGTH, 3),
        "document": (torch.int32, PACKS, LENGTH),
        "image": (torch.int32, PACKS, LENGTH),
        "tokens": (torch.int64, PACKS, LENGTH),
        "patches": (torch.uint8, IMAGE_TOKENS, 4, 768),
        "image_token_index": (torch.int64, IMAGE_TOKENS),
        "image_token_position": (torch.int32, IMAGE_TOKENS, 2),
        "target_index": (torch.int64, TRAINED),
        "targets": (torch.int64, TRAINED),
    }
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, *shape) in shapes.items()}


def test_forward_loss_and_backward_stay_on_the_device(build, on_device):
    model = build().to("meta")
    loss_function = WeightedLoss()
    weight, packs = torch.empty(TRAINED, device="meta"), inputs()
    with on_device():
        loss, count, report = loss_function(weight, model(**packs))
        loss.backward()
    assert {x.device.type for x in (loss, count, report["lm loss"])} == {"meta"}
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + torch.ones(2).to(x.device),
        lambda x: x.cpu(),
    ],
)
def test_a_wait_for_the_device_is_detected(on_device, waits):
    """The test above means something."""
    x = torch.empty(2, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), on_device():
        waits(x)


def test_images_are_standardised_as_their_preprocessing_says():
    from neo_megatron.data.image import IMAGE_MEAN, IMAGE_STD

    pixels = torch.arange(256, dtype=torch.uint8).repeat(3 * 4)[None].view(1, 4, 768)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (IMAGE_MEAN, IMAGE_STD))
    expected = ((pixels.double() / 255).unflatten(-1, (3, -1)) - mean) / std
    torch.testing.assert_close(normalise(pixels), expected.flatten(-2).float(), atol=5e-7, rtol=0)


def test_copied_tensors_are_pinned_first(monkeypatch):
    """A copy from ordinary memory waits for the device. What the loader has pinned is not pinned again."""
    pinned = []

    class Host(torch.Tensor):
        def is_pinned(self):
            return self.numel() == 3

        def pin_memory(self):
            pinned.append(self.numel())
            return self

        def to(self, device, non_blocking=False):
            assert non_blocking
            return super().to("cpu")

    tensors = {str(size): torch.zeros(size).as_subclass(Host) for size in (3, 4)}
    copied = to_device(tensors, torch.device("cuda"))
    assert pinned == [4] and [x.numel() for x in copied.values()] == [3, 4]
    to_device(tensors, torch.device("cpu"))
    assert pinned == [4]
