"""An image to ask about."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def image(golden: Path) -> Path:
    return golden / "images" / "c.png"
