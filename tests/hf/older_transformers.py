"""The tests of the model and the processor once more, with an older version of transformers."""

import os
from pathlib import Path

import pytest
from support.processes import run_python

# They choose their own version, are of one version of transformers only, or of torch more than of transformers.
NOT_AGAIN = (
    *("test_transformers_4_57.py", "test_transformers_5_23.py", "test_remote_code.py"),
    *("test_docs.py", "test_trl.py", "test_graphs.py", "test_serving.py"),
)


def run_with(version: str, *files: str) -> None:
    """Runs this directory's tests, or those files of it, in another process; skips without that version."""
    name = f"NEO_TEST_TRANSFORMERS_{version.replace('.', '')}"
    directory = os.environ.get(name)
    if not directory:
        pytest.skip(f"{name} names no directory with transformers {version} (tests/run.sh makes one)")
    here = Path(__file__).parent
    path = os.pathsep.join([directory, str(here.parents[1])])
    options = ["-n0", "-p", "no:cacheprovider", *(f"--ignore={here / other}" for other in NOT_AGAIN)]
    paths = [here / file for file in files] or [here]
    done = run_python("-m", "pytest", *paths, *options, environment={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"with transformers {version}." in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
