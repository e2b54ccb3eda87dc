"""A checkpoint as a stranger publishes it: weights, config and tokenizer, nothing else."""

import shutil
from pathlib import Path

import pytest

from neo_megatron.inference.answering import Answerer


@pytest.fixture(scope="session")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "neo"
    shutil.copytree(golden / "ckpt_untied", directory)
    for path in (golden / "tokenizer").iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="session")
def answerer(checkpoint: Path) -> Answerer:
    return Answerer(checkpoint, device="cpu")
