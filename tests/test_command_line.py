"""How a tool ends: what is a sentence and what keeps its traceback; and that Ctrl-C leaves none at any moment."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.paths import GOLDEN, TOOLS
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from neo_megatron import command_line
from neo_megatron.command_line import sentence_of
from neo_megatron.errors import CheckpointError, ConfigError, DataError


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/out/file")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("a; b"), "a; b"),
        (FULL, "/out/file cannot be written (No space left on device): free space, then run the same command again"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "the output cannot be written (Disk quota exceeded): free space",
        ),
        (caused(RuntimeError("PytorchStreamWriter failed"), FULL), "/out/file cannot be written"),
        (CheckpointException("save", {0: (FULL, None)}), "/out/file cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "/out: Permission denied"),
        (ModuleNotFoundError("No module named 'av.video'", name="av.video"), "the package av is not installed in"),
        (ModuleNotFoundError("--engine x needs y: install it"), "--engine x needs y: install it"),
        (ConfigError("two ranks: give one"), "two ranks: give one"),
        (CheckpointError("neo: no tensors: copy it again"), "neo: no tensors: copy it again"),
        (ValueError("a bug"), None),
        (TypeError("a bug"), None),
        (ModuleNotFoundError("No module named 'neo_megatron.x'", name="neo_megatron.x"), None),
    ],
)
def test_what_is_a_sentence(error, sentence):
    found = sentence_of(error)
    assert found is None if sentence is None else found.startswith(sentence)


class Broken:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> None:
        raise DataError("shards/00000.tokens.bin is missing: copy it again")


def test_an_error_of_a_loader_worker_is_its_sentence():
    with pytest.raises(DataError) as raised:
        list(DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(raised.value)
    assert sentence_of(raised.value) == "shards/00000.tokens.bin is missing: copy it again"


def test_a_program_ends_with_its_sentence_or_its_traceback():
    def fail(error: Exception):
        def main() -> None:
            raise error

        return main

    with pytest.raises(SystemExit, match="^tool: wrong; do this$"):
        command_line.run("tool", fail(DataError("wrong; do this")))
    with pytest.raises(TypeError):
        command_line.run("tool", fail(TypeError("a bug")))


def test_a_missing_package_is_named_while_the_tool_imports(tmp_path):
    """As with another Python than the one that neo_megatron was installed for."""
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')\n")
    words = ["--data", "s3://bucket/shards", "--output", "o", "--seq-length", "8"]
    paths = f"{tmp_path}:{TOOLS.parent}"
    done = subprocess.run(
        [sys.executable, str(TOOLS / "pack_data.py"), *words],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        f"pack_data: the package yaml is not installed in {sys.executable}: run pip install ."
    )


@pytest.mark.parametrize("seconds", [1.0, 2.5, 5.0])
def test_ctrl_c_leaves_no_traceback(tmp_path, seconds):
    """To the tool, the process that reads its tokenizer and those of its pool, at different moments of their starts."""
    documents = json.loads((GOLDEN / "meta.json").read_text())["untied_pack1"]["docs"]
    (tmp_path / "annotations.json").write_text(json.dumps(documents * 20000))
    words = ["--input", tmp_path / "annotations.json", "--image-root", GOLDEN, "--tokenizer", GOLDEN / "tokenizer"]
    process = subprocess.Popen(
        [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, words), "--output", str(tmp_path / "shards")]
        + ["--workers", "2", "--min-pixels", "4096", "--max-pixels", "65536"],
        env={**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT), printed
    assert "Traceback" not in printed and printed.splitlines()[-1].startswith("preprocess_data: interrupted"), printed
