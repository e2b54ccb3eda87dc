"""A checkpoint that answers."""

from pathlib import Path

import pytest

from neo_megatron.inference.answering import Answerer


@pytest.fixture(scope="session")
def answerer(checkpoint: Path) -> Answerer:
    return Answerer(checkpoint, device="cpu")
