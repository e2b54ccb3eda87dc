"""Outputs of every tool: links are followed, and anything else in the way is reported in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.golden_packs import TOOLS, make_packs
from support.paths import GOLDEN
from support.processes import run_forked

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.cli import inspect as inspect_data
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError

DIRECTORY_TOOLS = {
    "preprocess_data": "--input {room}/annotations.json --image-root {golden} --tokenizer {golden}/tokenizer",
    "pack_data": "--data {room}/shards --seq-length 192",
    "convert_checkpoint": "hf-to-megatron --hf {golden}/ckpt_untied",
    "generate": "--model {golden}/ckpt_untied --input {room}/annotations.json --image-root {golden}",
    "evaluate": "--model {golden}/ckpt_untied --input {room}/annotations.json --image-root {golden}",
}
IN_THE_WAY = {
    "a dangling link": "is a link that leads nowhere: create its target, or remove the link",
    "under a dangling link": "a link that leads nowhere: create its target, or remove the link",
    "a file": "is a file, not a directory: choose another directory",
    "a link to a file": "is a file, not a directory: choose another directory",
    "under a file": "which is a file: choose another directory",
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("outputs")
    make_packs(room, repeats=1, seq_length=192)
    return room


def put(directory: Path, kind: str) -> Path:
    """The path of an output, with the given obstacle in its way."""
    output = directory / "output"
    (directory / "file").write_text("somebody's")
    if "dangling" in kind:
        output.symlink_to(directory / "missing")
    elif "link" in kind:
        output.symlink_to(directory / "file")
    else:
        output.write_text("somebody's")
    return output / "below" if "under" in kind else output


def run(tool: str, flags: str, output: Path, room: Path) -> subprocess.CompletedProcess[str]:
    words = flags.format(room=room, golden=GOLDEN).split()
    return run_forked(TOOLS / f"{tool}.py", *words, "--output", output, separate=True)


def files(directory: Path) -> dict[str, bytes | str]:
    """Every file and link, to see that nothing was touched."""
    return {
        str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("tool", DIRECTORY_TOOLS)
def test_paths_that_cannot_be_an_output_directory_are_reported(room, tmp_path, tool, kind):
    output = put(tmp_path, kind)
    before = files(tmp_path)
    done = run(tool, DIRECTORY_TOOLS[tool], output, room)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{tool}: --output {output} "), done.stderr
    assert done.stderr.rstrip().endswith(IN_THE_WAY[kind]), done.stderr
    assert files(tmp_path) == before


def test_a_link_to_a_directory_is_followed(room, tmp_path):
    def preprocessed(output: Path) -> None:
        source = Source("golden", str(room / "annotations.json"), str(GOLDEN))
        preprocess([source], GOLDEN / "tokenizer", output, PreprocessConfig(min_pixels=4096, max_pixels=65536))

    written = {
        "preprocess": preprocessed,
        "pack": lambda output: write_packs([PackInput(str(room / "shards"))], output, 192),
        "convert": lambda output: convert_hf_to_megatron(GOLDEN / "ckpt_untied", output),
    }
    for name, write in written.items():
        (tmp_path / f"{name}-scratch").mkdir()
        (tmp_path / f"{name}-link").symlink_to(tmp_path / f"{name}-scratch")
        for output in ("link", "plain"):
            write(tmp_path / f"{name}-{output}")
        assert (tmp_path / f"{name}-link").is_symlink()
        names = [{path.name for path in (tmp_path / f"{name}-{place}").iterdir()} for place in ("scratch", "plain")]
        assert names[0] == names[1] and names[0], name
    assert not list(tmp_path.glob("*.partial"))


def inspect(room: Path, output: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_data", "--data", str(room / "shards"), "--output", str(output)])
    inspect_data.main()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("a dangling link", "is a link that leads nowhere: create its target, or remove the link"),
        ("a file", "exists and is not a page of this tool; choose another --output"),
        ("a link to a file", "exists and is not a page of this tool; choose another --output"),
        ("a directory", "is not a file that can be written; choose another --output"),
    ],
)
def test_paths_that_cannot_be_a_page_are_reported(room, tmp_path, monkeypatch, kind, sentence):
    output = tmp_path if kind == "a directory" else put(tmp_path, kind)
    before = files(tmp_path)
    with pytest.raises(DataError, match=sentence):
        inspect(room, output, monkeypatch)
    assert files(tmp_path) == before


def test_a_link_to_a_page_is_followed(room, tmp_path, monkeypatch):
    page, old = tmp_path / "page.html", tmp_path / "old.html"
    inspect(room, page, monkeypatch)
    expected = page.read_bytes()
    page.unlink()
    old.write_bytes(expected[:600])
    page.symlink_to(old)
    inspect(room, page, monkeypatch)
    assert page.is_symlink() and old.read_bytes() == expected
