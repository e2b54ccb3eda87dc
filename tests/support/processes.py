"""Starts Python processes: as a user does, or, much sooner, as forks of one that has imported Megatron."""

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
VARIABLES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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


def run_ranks(processes: int, *command: str | Path, environment: dict[str, str] | None = None) -> str:
    """As `torchrun`, without its start and without imports: for what does not depend on either."""
    done = run_forked(*command, environment=environment, ranks=processes)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run_python(
    *command: str | Path, environment: dict[str, str] | None = None, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Runs this Python, or another one, with one thread and no GPU; stdout and stderr come back as one text."""
    return subprocess.run(
        [python, *map(str, command)],
        env={**os.environ, **VARIABLES, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_forked(
    *command: str | Path, environment: dict[str, str] | None = None, ranks: int = 0, separate: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `run_python`, with Megatron imported before: a script, or `-m` and a module, as so many ranks (0: none).

    With ``separate``, stderr comes back as a text of its own.
    """
    request = {
        "command": [str(word) for word in command],
        "environment": {**os.environ, **VARIABLES, **(environment or {})},
        "directory": os.getcwd(),
        "ranks": ranks,
    }
    reads, output = os.pipe()
    ended, status = os.pipe()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        descriptors = [output, errors.fileno() if separate else output, status]
        socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
        os.close(output)
        os.close(status)
        with os.fdopen(reads, errors="replace") as text, os.fdopen(ended) as code:
            printed = text.read()
            written = code.read()
        errors.seek(0)
        said = errors.read() if separate else None
    assert written, f"the fork server has ended\n{printed[-3000:]}"
    return subprocess.CompletedProcess(request["command"], int(written), printed, said)


@cache
def _server() -> socket.socket:
    """The other end of a server that lives as long as this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, SERVER, str(theirs.fileno())],
        env={**os.environ, **VARIABLES},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours
