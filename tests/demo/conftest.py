"""An image to ask about."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def picture(golden: Path) -> Path:
    return golden / "images" / "c.png"
