"""The scripts of the examples import each other as scripts do: from their own directory."""

import shutil
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = EXAMPLES / "demo"
sys.path[:0] = [str(EXAMPLES / "quickstart"), str(DEMO)]


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "neo"
    shutil.copytree(golden / "ckpt_untied", directory)
    for path in (golden / "tokenizer").iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="module")
def picture(golden: Path) -> Path:
    return golden / "images" / "c.png"
