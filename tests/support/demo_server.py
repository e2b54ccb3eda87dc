"""The demo's server as a user starts it, and visitors that speak to it as its page does, without a browser."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

LOOK, ASK = 0, 1  # the page's events, in the order in which it makes them


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Args:
        address: of the page.
        process: of the server.
    """

    address: str
    process: psutil.Process


@contextlib.contextmanager
def served(checkpoint: Path, *flags: str) -> Iterator[Server]:
    """Starts the command with these flags, and ends it; it must end well."""
    command = [
        sys.executable,
        "-m",
        "neo_megatron",
        "demo",
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--port",
        "0",
        *flags,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            output = []
            for line in server.stdout:
                output.append(line)
                if found := re.match("the page: (.*)", line):
                    break
            else:
                raise AssertionError("".join(output))
            yield Server(found[1], psutil.Process(server.pid))
        finally:
            server.terminate()
        output += server.stdout
    assert server.returncode == 0, (server.returncode, "".join(output))


class Visitor:
    """One open page.

    Args:
        name: tells visitors apart.
    """

    def __init__(self, server: Server, name: str) -> None:
        self._api, self._session = f"{server.address}/gradio_api", name

    def upload(self, name: str, content: bytes) -> str:
        """The path of the file on the server."""
        answer = requests.post(f"{self._api}/upload", files={"files": (name, content)}, timeout=60)
        answer.raise_for_status()
        return answer.json()[0]

    def look(self, path: str) -> dict[str, Any]:
        """The parts of the page that show a file."""
        return self._last(LOOK, [{"path": path, "meta": {"_type": "gradio.FileData"}}, None])

    def ask(self, question: str) -> dict[str, Any]:
        """The parts of the page that show the complete answer."""
        return self._last(ASK, [question, None, 1])

    def leave(self, question: str) -> None:
        """Asks, and closes the connection when the answer begins."""
        events = self._events(ASK, [question, None, 1])
        next(event for event in events if event["msg"] == "process_generating")
        events.close()

    def _last(self, function: int, data: list[Any]) -> dict[str, Any]:
        completed = next(event for event in self._events(function, data) if event["msg"] == "process_completed")
        assert completed["success"], completed
        return completed["output"]["data"][0]

    def _events(self, function: int, data: list[Any]) -> Iterator[dict[str, Any]]:
        job = {"fn_index": function, "session_hash": self._session, "data": data}
        requests.post(f"{self._api}/queue/join", json=job, timeout=60).raise_for_status()
        address = f"{self._api}/queue/data?session_hash={self._session}"
        with requests.get(address, stream=True, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
