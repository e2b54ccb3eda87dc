"""`neo-megatron`: its commands, their help, and that the installed wheel needs no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.paths import GOLDEN, ROOT

from neo_megatron import __version__
from neo_megatron.cli import main as cli
from neo_megatron.cli.commands import COMMANDS


def run(monkeypatch, *words: str) -> int:
    """Runs `neo-megatron` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["neo-megatron", *words])
    try:
        cli.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int | None), stop.code
        return stop.code or 0
    return 0


def test_help_lists_every_command(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert run(monkeypatch) == 2 and capsys.readouterr().out == printed


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"neo-megatron {__version__}\n"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("preprocess-data", "did you mean preprocess"), ("train", "did you mean pretrain"), ("x", "give one")],
)
def test_an_unknown_command_is_an_error(monkeypatch, capsys, name, remedy):
    assert run(monkeypatch, name) == 2
    assert capsys.readouterr().err.startswith(f"neo-megatron: there is no command {name!r}: {remedy}")


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.starts_itself])
def test_every_command_has_help(monkeypatch, capsys, name):
    assert run(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: neo-megatron {name} ")


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_script_of_tools_is_a_command(tool):
    """The others are for people who work on this package."""
    text = (ROOT / "tools" / tool).read_text()
    if tool not in ("sweep_flex_attention.py", "write_commands.py"):
        assert any(f'run_command("{name}")' in text for name in COMMANDS) and len(text.splitlines()) < 8


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """`neo-megatron` of a wheel, in an environment that has its dependencies but not this checkout."""
    room = tmp_path_factory.mktemp("installed")
    source = room / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=lambda directory, names: (
            {"tests", "docs", ".git", "examples"} & set(names)
            | {name for name in names if name.startswith(".venv") or name in ("build", "runs", "__pycache__")}
        ),
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", room, source]
    subprocess.run(list(map(str, build)), check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(room / "environment")], check=True)
    python = room / "environment" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # A line of a .pth file adds a directory, but none of the .pth files in it, as that of an editable installation.
    (room / "environment" / "lib" / version / "site-packages" / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )
    (wheel,) = room.glob("*.whl")
    install = [*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel]
    subprocess.run(list(map(str, install)), check=True)
    return python.with_name("neo-megatron")


def test_the_wheel_runs_outside_the_checkout(installed, tmp_path):
    def call(*words: object) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(installed), *map(str, words)],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    documents = json.loads((GOLDEN / "meta.json").read_text())["untied_pack1"]["docs"]
    (tmp_path / "train.json").write_text(json.dumps(documents * 4))
    pixels = ("--min-pixels", 4096, "--max-pixels", 65536)
    tokenizer = ("--tokenizer", GOLDEN / "tokenizer")
    call("preprocess", "--input", "train.json", "--image-root", GOLDEN, *tokenizer, "--output", "shards", *pixels)
    call("pack", "--data", "shards", "--output", "packs", "--seq-length", 192)
    assert "is intact" in call("verify-data", "--data", "packs")
    call("inspect", "--packs", "packs", *tokenizer, "--output", "page.html")
    assert "<canvas" in (tmp_path / "page.html").read_text() or "<img" in (tmp_path / "page.html").read_text()
    call("convert", "hf-to-megatron", "--hf", GOLDEN / "ckpt_untied", "--output", "start")
    size = ("--neo-model", GOLDEN / "ckpt_untied", "--pretrained-checkpoint", "start")
    batch = ("--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 2, "--num-workers", 0)
    call("pretrain", *size, "--train-data-path", "packs", *batch, "--save", "run", "--save-interval", 2, "--async-save")
    call("convert", "megatron-to-hf", "--megatron", "run", *tokenizer, "--output", "trained")
    assert call("generate", "--model", "trained", "--prompt", "Hi", "--max-new-tokens", 4)
    assert "fits" in call("plan", "--neo-model", "tiny", "--seq-length", 4096)
