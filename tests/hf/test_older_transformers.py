"""The tests of the model and the processor once more, with older versions of transformers."""

import os
from pathlib import Path

import pytest
from conftest import run_python

OLDER = ["4.57", "5.23"]
# They choose their own version, are of one version of transformers only, or of torch more than of transformers.
NOT_AGAIN = ("test_older_transformers.py", "test_remote_code.py", "test_docs.py", "test_trl.py", "test_graphs.py")


@pytest.mark.parametrize("version", OLDER)
def test_everything_else(version):
    name = f"NEO_TEST_TRANSFORMERS_{version.replace('.', '')}"
    directory = os.environ.get(name)
    if not directory:
        pytest.skip(f"{name} names no directory with transformers {version} (tests/run.sh makes one)")
    here = Path(__file__).parent
    path = os.pathsep.join([directory, str(here.parents[1])])
    options = ["-n0", "-p", "no:cacheprovider", *(f"--ignore={here / other}" for other in NOT_AGAIN)]
    done = run_python("-m", "pytest", here, *options, environment={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"with transformers {version}." in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
