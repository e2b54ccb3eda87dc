"""The golden tokenizer, opened."""

from pathlib import Path
from typing import Any

import pytest

from neo_megatron.data.chat import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(golden: Path) -> Any:
    return load_tokenizer(golden / "tokenizer")
