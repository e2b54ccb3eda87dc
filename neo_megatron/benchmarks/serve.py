"""The quickstart's test questions, answered in batches, by `transformers serve` and by vLLM on the same machine.

Every way is a process of its own, whose start is not measured. First one question after another is asked, for the time
to the first token; then all of them, of servers by several clients at once.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from neo_megatron.benchmarks.serve_questions import MAX_NEW_TOKENS, chosen_questions
from neo_megatron.data.prepare.stored_file import image_bytes
from neo_megatron.data.tags import IMAGE_TAG
from neo_megatron.errors import DataError
from neo_megatron.inference.questions import Question
from neo_megatron.packages import is_installed

BATCH = 128
CLIENTS = 16
STREAMED = 50
"""Questions that are asked one after another."""

_COLUMNS = [
    "way",
    "answers per second",
    "time to the first token, ms",
    "peak memory, MB",
    "answers other than in batches",
]
_VLLM_CACHE = 256 << 20
"""Bytes of keys and values, enough for the quickstart's model."""
_SERVER_PACKAGES = ("fastapi", "uvicorn", "openai")


@dataclass(frozen=True)
class Measured:
    """One way.

    Args:
        answers: in the order of the questions.
        seconds: for all of them together.
        first: seconds to the first token of each of the questions that were asked one after another.
        memory: bytes, the sum of the peaks of its processes.
    """

    answers: list[str]
    seconds: float
    first: list[float]
    memory: int


def measure(quickstart: Path, parts: Sequence[str], count: int, vllm_python: Path | None, scratch: Path) -> str:
    """The table of the ways.

    Args:
        quickstart: the output of `examples/quickstart/run.sh`.
        parts: the ways: "batches", "transformers", "vllm".
        count: of questions, evenly drawn from all.
        vllm_python: Python of an environment with vLLM and this package's plug-in.
        scratch: directory for the copies of an export's code that transformers makes.

    Raises:
        DataError: the quickstart has not run; a server ends before it answers.
    """
    model, registry = quickstart / "neo", quickstart / "registry.yaml"
    for path in (model, registry):
        if not path.exists():
            raise DataError(
                f"{path} is missing: run bash examples/quickstart/run.sh, or give its output with --quickstart"
            )
    rows, absent = {}, []
    for part in parts:
        reason = _why_not(part, vllm_python)
        if reason:
            absent.append(f"{_TITLES[part]} was not run, because {reason}")
            continue
        print(f"measuring {part}", file=sys.stderr, flush=True)
        if part == "batches":
            rows[part] = _in_batches(model, registry, count)
        else:
            rows[part] = _served(part, model, registry, count, vllm_python, scratch)
    lines = [_COLUMNS, ["---"] * len(_COLUMNS)]
    lines += [_row(part, measured, rows.get("batches")) for part, measured in rows.items()]
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *absent])


_TITLES = {
    "batches": f"as `neo-megatron generate --batch-size {BATCH}`, one process",
    "transformers": f"`transformers serve`, {CLIENTS} clients",
    "vllm": f"vLLM, {CLIENTS} clients",
}


def _why_not(part: str, vllm_python: Path | None) -> str | None:
    needed = {"batches": (), "transformers": _SERVER_PACKAGES, "vllm": ("openai",)}[part]
    if missing := [name for name in needed if not is_installed(name)]:
        return f"{missing[0]} is not installed: pip install 'transformers[serving]'"
    if part == "vllm" and vllm_python is None:
        return "--vllm-python names no Python with vLLM (docs/serving.md)"
    return None


def _row(part: str, measured: Measured, reference: Measured | None) -> list[str]:
    others = "" if reference is None else str(_differing(measured.answers, reference.answers))
    return [
        *(_TITLES[part], f"{len(measured.answers) / measured.seconds:.1f}", f"{1000 * median(measured.first):.0f}"),
        *(f"{measured.memory / 1e6:,.0f}", f"{others} of {len(measured.answers)}" if others else ""),
    ]


def _differing(answers: Sequence[str], others: Sequence[str]) -> int:
    return sum(one.strip() != other.strip() for one, other in zip(answers, others, strict=True))


def _in_batches(model: Path, registry: Path, count: int) -> Measured:
    numbers = map(str, (count, BATCH, STREAMED))
    command = [sys.executable, "-m", "neo_megatron.benchmarks.serve_questions", model, registry, *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Measured(**json.loads(done.stdout))


def _served(part: str, model: Path, registry: Path, count: int, vllm_python: Path | None, scratch: Path) -> Measured:
    import openai

    port = _free_port()
    settings = ["--host", "127.0.0.1", "--port", str(port)]
    if part == "transformers":
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--trust-remote-code"]
    else:
        # `vllm serve` fails in builds for CPUs, which are a package of another name.
        command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--max-model-len", "1024"]
        settings += ["--max-num-seqs", str(CLIENTS), "--kv-cache-memory-bytes", str(_VLLM_CACHE), "--enforce-eager"]
        # vLLM's default computes a float32 checkpoint in bfloat16.
        settings += ["--dtype", json.loads((model / "config.json").read_text())["dtype"]]
    chats = [[_message(question)] for question in chosen_questions(registry, count)]
    environment = {"HF_MODULES_CACHE": str((scratch / "modules").resolve()), "HF_HUB_OFFLINE": "1"}
    with _started([*command, *settings], port, scratch / f"{part}.log", environment) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        ask = client.chat.completions.create
        asked: dict[str, Any] = {"model": str(model), "max_tokens": MAX_NEW_TOKENS, "temperature": 0}

        def answer(chat: list[dict]) -> str:
            return ask(messages=chat, **asked).choices[0].message.content

        answer(chats[0])
        first = [_seconds_to_first(ask(messages=chat, stream=True, **asked)) for chat in chats[:STREAMED]]
        with ThreadPoolExecutor(CLIENTS) as clients:
            start = time.perf_counter()
            answers = list(clients.map(answer, chats))
            seconds = time.perf_counter() - start
        processes = [server, *server.children(recursive=True)]
        return Measured(answers, seconds, first, sum(map(_peak_memory, processes)))


def _message(question: Question) -> dict[str, Any]:
    """A question as a message of OpenAI, its image in front of its text as the template writes it."""
    (image,), text = question.sample.images, question.text.removeprefix(f"{IMAGE_TAG}\n")
    url = f"data:image/png;base64,{base64.b64encode(image_bytes(image)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def _seconds_to_first(stream: Any) -> float:
    """Reads a stream to its end."""
    start, first = time.perf_counter(), None
    for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
    if first is None:
        raise DataError("an answer has no text: give a trained model with --quickstart")
    return first


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def _started(
    command: Sequence[str | Path], port: int, log: Path, environment: dict[str, str]
) -> Iterator[psutil.Process]:
    """A server that answers on its port; it is ended afterwards.

    Raises:
        DataError: it ended before that.
    """
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment) as server,
    ):
        try:
            while not _is_healthy(port):
                if server.poll() is not None:
                    raise DataError(f"{' '.join(map(str, command))} ended: {log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.2)
            yield psutil.Process(server.pid)
        finally:
            server.terminate()


def _is_healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def _peak_memory(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
