"""What the tests of a GPU share: `python -m pytest tests/gpu` on a machine with one. Without one all are skipped."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, run_python

TOOLS = Path(__file__).parents[2] / "tools"
HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
RECIPES = ("delayed", "tensorwise", "blockwise")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def transformer_engine(gpu) -> None:
    if not HAVE_TE:
        pytest.skip("Transformer Engine is not installed")


@pytest.fixture(params=RECIPES)
def recipe(request, transformer_engine) -> str:
    """An FP8 recipe that this GPU has."""
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9) or (request.param == "blockwise" and capability < (9, 0)):
        pytest.skip(f"FP8 with the recipe {request.param} needs a newer GPU than sm_{capability[0]}{capability[1]}")
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
    room = tmp_path_factory.mktemp("packs")
    golden = json.loads((GOLDEN / "meta.json").read_text())
    documents = golden["untied_pack1"]["docs"] + golden["untied_textonly"]["docs"]
    (room / "annotations.json").write_text(json.dumps(documents * 16))
    for command in (
        f"preprocess_data.py --input {room}/annotations.json --image-root {GOLDEN} --tokenizer {GOLDEN}/tokenizer "
        f"--output {room}/shards --min-pixels 4096 --max-pixels 65536 --workers 1",
        f"pack_data.py --data {room}/shards --output {room}/packs --seq-length 256",
    ):
        tool, *arguments = command.split()
        done = run_python(TOOLS / tool, *arguments)
        assert done.returncode == 0, done.stdout
    return room / "packs"


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
