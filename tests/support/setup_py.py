"""The requirements in setup.py, read by setuptools."""

from distutils.core import run_setup  # setuptools provides it

from support.paths import ROOT


def setup_requirements() -> tuple[list[str], dict[str, list[str]]]:
    """``install_requires``, and the requirements of each extra."""
    distribution = run_setup(str(ROOT / "setup.py"), stop_after="init")
    return distribution.install_requires, distribution.extras_require
