"""The scripts of the examples import each other as scripts do: from their own directory."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = EXAMPLES / "demo"
sys.path[:0] = [str(EXAMPLES / "quickstart"), str(DEMO)]
