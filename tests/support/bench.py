"""Fixtures of the data path's tests: the golden tokenizer, annotation files, and the tools as functions."""

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers  # noqa: F401 - or each call of preprocess would start a process to load it
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from support.paths import TOOLS
from support.processes import run_forked


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command line of ``tools/``; stdout and stderr come back apart."""

    def run(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        return run_forked(TOOLS / name, *arguments, separate=True)

    return run


@pytest.fixture(scope="session")
def tokenizer(golden: Path) -> Path:
    """A small tokenizer with Qwen's added tokens."""
    return golden / "tokenizer"


def conversation(*texts: str) -> list[dict[str, str]]:
    """Turns of human and gpt, alternating."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def sample(*texts: str, **keys: Any) -> dict[str, Any]:
    """An annotation record."""
    return {"conversations": conversation(*(texts or ("Hi", "Hello!"))), **keys}


def png(height: int = 40, width: int = 60, seed: int = 0, mode: str = "RGB") -> bytes:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@dataclass
class Workbench:
    """One test's directory, with the steps of the data path as functions on it."""

    path: Path
    tokenizer: Path
    settings: PreprocessConfig = PreprocessConfig(min_pixels=1024, max_pixels=65536)

    def images(self, *names: str) -> None:
        """Small images, different ones, under ``images/``."""
        for seed, name in enumerate(names):
            file = self.path / "images" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(40 + 32 * seed, 60, seed))

    def annotations(self, records: list[Any], name: str = "train.json") -> Path:
        """Writes records as a JSON array, or as lines where the name says so."""
        path = self.path / name
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n" if name.endswith(".jsonl") else "[" + ",\n".join(lines) + "]")
        return path

    def preprocess(
        self,
        records: list[Any] | Path,
        output: str = "shards",
        settings: PreprocessConfig | None = None,
        on_error: str = "skip",
        workers: int = 1,
    ) -> ShardSet:
        """Shards of records, or of an annotation file; images lie under ``images/``."""
        (self.path / "images").mkdir(exist_ok=True)
        file = records if isinstance(records, Path) else self.annotations(records)
        source = Source("train", str(file), str(self.path / "images"))
        preprocess([source], self.tokenizer, self.path / output, settings or self.settings, on_error, workers)
        return ShardSet(self.path / output)

    def rejects(self, output: str = "shards") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / output / "rejects.jsonl").read_text().splitlines()]

    def pack(self, length: int, seed: int = 0, data: str = "shards", output: str = "packs") -> Path:
        write_packs([PackInput(str(self.path / data))], self.path / output, length, seed)
        return self.path / output


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Path) -> Workbench:
    return Workbench(tmp_path, tokenizer)


@pytest.fixture(scope="session")
def new_bench(tokenizer: Path) -> Callable[[Path], Workbench]:
    """Makes a workbench in a directory that several tests share."""
    return lambda path: Workbench(path, tokenizer)


@pytest.fixture(scope="session")
def new_sample() -> Callable[..., dict[str, Any]]:
    return sample


@pytest.fixture
def new_png() -> Callable[..., bytes]:
    return png


@pytest.fixture
def directory_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Name and content of every file of a directory."""
    return lambda directory: {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def samples_of() -> Callable[[ShardSet], list[tuple[list[int], list[int]]]]:
    """(tokens, flattened spans) of every sample of a data set."""

    def read(shards: ShardSet) -> list[tuple[list[int], list[int]]]:
        located = [shards.locate(number) for number in range(len(shards))]
        return [(shard.tokens[local].tolist(), shard.spans[local].tolist()) for shard, local in located]

    return read
