"""The scripts of the examples import each other as scripts do: from their own directory."""

import sys

from support.paths import ROOT

for name in ("quickstart", "ablations"):
    sys.path.insert(0, str(ROOT / "examples" / name))
