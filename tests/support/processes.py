"""Starts Python processes as a user does."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(processes: int, *command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Runs `python command` on several gloo processes, one thread each; returns their output.

    Raises:
        AssertionError: a process failed; the message ends with what it printed.
    """
    done = run_python(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--standalone",
        *command,
        environment=environment,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run_python(
    *command: str | Path, environment: dict[str, str] | None = None, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Runs this Python, or another one, with one thread and no GPU; stdout and stderr come back as one text."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    return subprocess.run(
        [python, *map(str, command)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
