"""What all tests share: where the reference numbers lie, and how torchrun is started."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the numbers that the published code computed on a tiny random model."""
    return GOLDEN


@pytest.fixture(scope="session")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a stranger publishes it: weights, config and tokenizer, nothing else."""
    directory = tmp_path_factory.mktemp("checkpoint") / "neo"
    shutil.copytree(golden / "ckpt_untied", directory)
    for path in (golden / "tokenizer").iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="session")
def megatron():
    """A process group of one without a GPU, with Megatron's groups and random states."""
    from neo_megatron.megatron_compat import cpu_platform

    cpu_platform.install()
    import torch
    from megatron.core import parallel_state, tensor_parallel

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def torchrun(processes: int, *command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Runs `python command` on several gloo processes, one thread each; returns their output.

    Raises:
        AssertionError: a process failed; the message ends with what it printed.
    """
    done = run_python(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--standalone",
        *command,
        environment=environment,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run_python(
    *command: str | Path, environment: dict[str, str] | None = None, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Runs this Python, or another one, with one thread and no GPU; stdout and stderr come back as one text."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    return subprocess.run(
        [python, *map(str, command)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """The golden numbers are float32 on one thread; two threads on two cores are also many times slower."""
    import torch

    torch.set_num_threads(1)
