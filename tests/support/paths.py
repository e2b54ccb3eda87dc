"""Paths of this repository."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TOOLS = ROOT / "tools"
GOLDEN = TESTS / "golden"
