"""Every other test of this directory once more, with transformers 4.57."""

import os
from pathlib import Path

import pytest
from conftest import run_python

OLD_TRANSFORMERS = os.environ.get("NEO_TEST_TRANSFORMERS_457")


@pytest.mark.skipif(
    not OLD_TRANSFORMERS, reason="NEO_TEST_TRANSFORMERS_457 names no directory with 4.57 (tests/run.sh makes one)"
)
def test_everything_else():
    here = Path(__file__).parent
    both = [f"--ignore={here / name}" for name in (Path(__file__).name, "test_remote_code.py")]
    path = os.pathsep.join([OLD_TRANSFORMERS, str(here.parents[1])])
    options = ["-n0", "-p", "no:cacheprovider", *both]
    done = run_python("-m", "pytest", here, *options, environment={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-6000:]
    assert "with transformers 4.57." in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
