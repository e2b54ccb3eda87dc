"""Fixtures that all tests share."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from support.markers import add_markers
from support.paths import GOLDEN

pytest_plugins = ["support.bench", "support.checkpoints"]


def pytest_configure() -> None:
    """Under `nohup` or in the background some signals are ignored, also by all processes that tests start."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the numbers that the published code computed on a tiny random model."""
    return GOLDEN


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a third party publishes it: weights, config and tokenizer, nothing else.

    With `support.markers.every_variant` also exports of small random models.
    """
    directory = tmp_path_factory.mktemp("checkpoint") / "neo"
    if (variant := getattr(request, "param", "separate")) != "separate":
        from support.layout_runs import EXPERTS, IN_HEAD, write_random_model

        from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
        from neo_megatron.data.chat import load_tokenizer

        sizes = EXPERTS if variant == "experts" else IN_HEAD
        directory.with_name("random").mkdir()
        model = write_random_model(directory.with_name("random"), sizes.replace(min_pixels=4096, max_pixels=65536))
        convert_megatron_to_hf(model / "megatron", directory, load_tokenizer(golden / "tokenizer"))
        return directory
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The golden numbers are float32 on one thread; two threads on two cores are also many times slower."""
    import torch

    torch.set_num_threads(1)
    add_markers(items)
    # The quick ones last, so that no worker waits for another one's training at the end.
    items.sort(key=lambda item: [item.get_closest_marker(marker) is None for marker in ("distributed", "slow")])
