"""Fixtures of the GPU tests: `python -m pytest tests/gpu` on a machine with one. Without a GPU all are skipped."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden_packs import make_packs

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
RECIPES = ("delayed", "tensorwise", "blockwise")


# Files in this order: what decides most comes first, in case a machine is lent for a short time.
ORDER = ("tiles", "attention", "profile", "fp8_load", "norm_rotary", "layers", "training", "golden", "generate")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests of this directory, which keep their places among all others; float32 is for references."""
    here = Path(__file__).parent
    places = [place for place, item in enumerate(items) if item.path.parent == here]
    tests = sorted(
        (items[place] for place in places),
        key=lambda item: ("torch.float32" in item.name, ORDER.index(item.path.stem.removeprefix("test_"))),
    )
    for place, item in zip(places, tests, strict=True):
        items[place] = item


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def transformer_engine(gpu) -> None:
    if not HAVE_TE:
        pytest.skip("Transformer Engine is not installed")


def has_recipe(recipe: str) -> bool:
    """Whether this GPU has an FP8 recipe."""
    return torch.cuda.get_device_capability() >= ((9, 0) if recipe == "blockwise" else (8, 9))


@pytest.fixture(params=RECIPES)
def recipe(request, transformer_engine) -> str:
    """An FP8 recipe that this GPU has."""
    if not has_recipe(request.param):
        pytest.skip(f"FP8 with the recipe {request.param} needs a newer GPU than {torch.cuda.get_device_name()}")
    return request.param


@pytest.fixture(scope="session")
def one_gpu(gpu) -> Iterator[None]:
    """A process group of one GPU, with Megatron's groups and random states."""
    from megatron.core import parallel_state, tensor_parallel

    torch.cuda.set_device(gpu)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def poisoned() -> Callable[[], None]:
    """Fills memory with NaN and gives it back to PyTorch, so that what a kernel does not write shows."""

    def poison() -> None:
        large = torch.full((2**26,), torch.nan, device="cuda")
        # Below a megabyte PyTorch takes memory from another pool.
        small = [torch.full((2**14,), torch.nan, device="cuda") for _ in range(256)]
        del large, small

    return poison


@pytest.fixture(scope="session")
def packs(tmp_path_factory) -> Path:
    """Packs of 256 tokens of the golden documents, made with the tools."""
    return make_packs(tmp_path_factory.mktemp("packs"), repeats=16, seq_length=256)


@pytest.fixture(scope="session")
def visible() -> dict[str, str]:
    """The environment of a process that sees the GPU; other tests hide it."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def to_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()}
