"""A server with OpenAI's interface as a user starts it."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import VARIABLES


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Args:
        client: an `openai.OpenAI`.
        log: the file of what it prints.
    """

    client: Any
    log: Path

    def says(self, sentence: str) -> bool:
        """Whether it prints this within a minute: it answers before it prints why it failed."""
        return any(sentence in self.log.read_text(errors="replace") or time.sleep(0.1) for _ in range(600))


@contextlib.contextmanager
def served(command: Sequence[str | Path], log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Starts a command that prints uvicorn's line with its address, and ends it.

    Raises:
        AssertionError: it ended before that line; the message ends with what it printed.
    """
    import openai

    variables = {**os.environ, **VARIABLES, **environment}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=variables) as server:
        try:
            # After a failure uvicorn closes a connection that the client may still use for the next request.
            settings = {"api_key": "none", "max_retries": 0, "default_headers": {"Connection": "close"}}
            yield Server(openai.OpenAI(base_url=f"{_address(server, log)}/v1", **settings), log)
        finally:
            server.terminate()


def _address(server: subprocess.Popen, log: Path) -> str:
    while not (found := re.search(r"Uvicorn running on (\S+)", log.read_text(errors="replace"))):
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=0.2)
        assert server.returncode is None, log.read_text(errors="replace")[-6000:]
    return found[1]
