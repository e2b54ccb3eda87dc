"""Every kind of path given to every flag that takes one: accepted, or one sentence with a remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import GOLDEN, ROOT

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.pre_buffer import extract_pre_buffer
from neo_megatron.checkpoint.reader import open_either
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError
from neo_megatron.paths import Kind, Wanted, WrongPath, check_flags, check_path, kind_of


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """One path of every kind, under the kind's name; data sets and checkpoints are made with the tools' functions."""
    room = tmp_path_factory.mktemp("paths")
    documents = json.loads((GOLDEN / "meta.json").read_text())["untied_pack1"]["docs"]
    (room / "annotations.json").write_text(json.dumps(documents))
    source = Source("golden", str(room / "annotations.json"), str(GOLDEN))
    preprocess([source], GOLDEN / "tokenizer", room / "shards", PreprocessConfig(min_pixels=4096, max_pixels=65536))
    write_packs([PackInput(str(room / "shards"))], room / "packs", 192)
    for made, left, kept in (
        ("shards", "unfinished_shards", "run.json"),
        ("packs", "unfinished_packs", "neo-packs.partial"),
    ):
        shutil.copytree(room / made, room / left)
        (room / left / "manifest.json").unlink()
        (room / left / kept).write_text("{}\n")
    shutil.copytree(room / "shards", room / "no_manifest")
    (room / "no_manifest" / "manifest.json").unlink()
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "megatron")
    shutil.copytree(room / "megatron" / "release", room / "iteration")
    (room / "unfinished_save" / "iter_0000010").mkdir(parents=True)
    shutil.copytree(GOLDEN / "ckpt_untied", room / "neo")
    shutil.copytree(GOLDEN / "qwen3_untied", room / "qwen3")
    shutil.copytree(GOLDEN / "qwen3_untied", room / "other_model")
    (room / "other_model" / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(GOLDEN / "tokenizer", room / "tokenizer")
    for name, file in (("answers", "answers.jsonl"), ("directory", "notes.txt")):
        (room / name).mkdir()
        (room / name / file).write_text("")
    shutil.copytree(GOLDEN / "images", room / "images")
    (room / "empty").mkdir()
    (room / "registry.yaml").write_text("golden: {annotation_path: annotations.json}\n")
    (room / "notes.txt").write_text("words")
    neo = shutil.copytree(room / "neo", room / "neo-with-tokenizer")
    shutil.copytree(GOLDEN / "tokenizer", neo, dirs_exist_ok=True)
    extract_pre_buffer(open_either(neo), room / "pre_buffer", 1 << 30)
    return room


FILES = {
    Kind.MISSING: "nowhere",
    Kind.ANNOTATIONS: "annotations.json",
    Kind.YAML: "registry.yaml",
    Kind.IMAGE: "images/a.png",
    Kind.FILE: "notes.txt",
}


def example(room: Path, kind: Kind) -> Path:
    return room / FILES.get(kind, kind.name.lower())


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_every_kind_is_recognised(room, kind):
    assert kind_of(example(room, kind)) is kind


@pytest.mark.parametrize("wanted", Wanted, ids=lambda wanted: wanted.name)
def test_every_kind_where_each_is_wanted(room, wanted):
    for kind in Kind:
        path = example(room, kind)
        if kind in wanted.kinds or (wanted, kind) == (Wanted.SIZES, Kind.MISSING):  # which may be a preset
            check_path(path, wanted, "--flag")
            continue
        with pytest.raises(WrongPath) as raised:
            check_path(path, wanted, "--flag")
        sentence = str(raised.value)
        assert sentence.startswith(f"--flag {path} {kind.value}") and "\n" not in sentence
        assert ": " in sentence.removeprefix(f"--flag {path}"), "a remedy"
        assert "damaged" not in sentence


SENTENCES = {
    ("PACKS", "SHARDS"): "holds shards, not packs: run neo-megatron pack first",
    ("PACKS", "UNFINISHED_SHARDS"): "run the same neo-megatron preprocess command again",
    ("PACKS", "UNFINISHED_PACKS"): "run the same neo-megatron pack command again",
    ("PACKS", "ANNOTATIONS"): "is an annotation file, not packs: run neo-megatron preprocess and neo-megatron pack",
    ("PACKS", "MISSING"): "does not exist: give a directory that neo-megatron pack has written",
    ("SHARDS", "PACKS"): "holds packs, not shards: give the shards that they were packed from",
    ("SHARDS", "NO_MANIFEST"): "holds a data set without its manifest.json, not shards: copy it again in full",
    ("NEO", "MEGATRON"): "export it first (neo-megatron convert megatron-to-hf)",
    ("NEO", "QWEN3"): "make a NEO of it first (neo-megatron convert qwen3-to-neo)",
    ("MEGATRON", "NEO"): "convert it first (neo-megatron convert hf-to-megatron)",
    ("START", "NEO"): "convert it first (neo-megatron convert hf-to-megatron)",
    ("START", "ITERATION"): "is one iteration of a Megatron checkpoint, not a Megatron checkpoint: give the directory",
    ("RUN", "NEO"): "hf-to-megatron) and give it as --pretrained-checkpoint",
    ("QWEN3", "NEO"): "it has a pre-buffer already",
    ("SIZES", "QWEN3"): "make a NEO of it first (neo-megatron convert qwen3-to-neo)",
    ("TOKENIZER", "MEGATRON"): "give the --tokenizer that neo-megatron preprocess was given",
    ("ANNOTATIONS", "YAML"): "give a registry with --registry and --datasets",
    ("REGISTRY", "ANNOTATIONS"): "give an annotation file with --input",
    ("IMAGE_ROOT", "FILE"): "is a file, not a directory",
    ("OUTPUT", "FILE"): "is a file, not a directory",
}


@pytest.mark.parametrize(("wanted", "kind"), SENTENCES)
def test_the_remedy_fits_the_path(room, wanted, kind):
    with pytest.raises(WrongPath) as raised:
        check_path(example(room, Kind[kind]), Wanted[wanted])
    assert SENTENCES[wanted, kind] in str(raised.value)


def test_readers_raise_the_same_message(room):
    """Even if no command line was checked, as for the second data set of a mixture."""
    for read, path, sentence in (
        (PackIndex.open, "shards", "holds shards, not packs: run neo-megatron pack first"),
        (ShardSet, "packs", "holds packs, not shards"),
        (PackIndex.open, "nowhere", "nowhere does not exist"),
        (ShardSet, "unfinished_shards", "holds an unfinished data set"),
        (verify, "megatron", "is a Megatron checkpoint, not shards or packs"),
        (lambda path: write_packs([PackInput(path)], room / "out", 192), "packs", "holds packs, not shards"),
        (lambda path: Source("web", path), "images", "data set web: .* is a directory of images, not an annotation"),
    ):
        with pytest.raises(DataError, match=sentence):
            read(str(room / path))
    for read, path, sentence in (
        (open_either, "nowhere", "nowhere does not exist"),
        (lambda path: convert_hf_to_megatron(path, room / "out"), "megatron", "export it first"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read(str(room / path))


def test_an_unfinished_conversion_is_reported(room):
    (room / "half.partial").mkdir()
    with pytest.raises(WrongPath, match="half does not exist, only .*half.partial, which is unfinished"):
        check_path(room / "half", Wanted.NEO)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--data {room}/shards%50 {room}/shards%12.5", Wanted.SHARDS),
        ("--data s3://bucket/shards msc://profile/shards", Wanted.SHARDS),
        ("--data org/name", Wanted.NEO),
        ("--data {room}/neo --other {room}/nowhere", Wanted.NEO),
        ("-- --data {room}/nowhere", Wanted.NEO),
    ],
)
def test_a_correct_command_line_passes(room, words, wanted):
    check_flags(words.format(room=room).split(), {"--data": wanted})


@pytest.mark.parametrize(
    "words",
    ["--data={room}/nowhere", "--data {room}/shards {room}/nowhere", "--data {room}/shards --data {room}/nowhere%50"],
)
def test_a_wrong_path_is_found_anywhere_on_the_command_line(room, words):
    with pytest.raises(WrongPath, match="--data .*nowhere does not exist"):
        check_flags(words.format(room=room).split(), {"--data": Wanted.SHARDS})


# Every tool, with one path that is of the wrong kind.
COMMANDS = {
    "preprocess_data --input @/shards --tokenizer @/tokenizer --output @/o": "--input",
    "preprocess_data --input @/annotations.json --tokenizer @/megatron --output @/o": "--tokenizer",
    "preprocess_data --registry @/annotations.json --datasets a --tokenizer t --output @/o": "--registry",
    "preprocess_data --input @/annotations.json --image-root @/notes.txt --tokenizer t --output o": "--image-root",
    "pack_data --data @/shards @/packs --output @/o --seq-length 192": "--data",
    "pack_data --data @/shards --output @/notes.txt --seq-length 192": "--output",
    "inspect_data --packs @/shards --output @/o.html": "--packs",
    "inspect_data --data @/packs --output @/o.html": "--data",
    "verify_data --data @/annotations.json": "--data",
    "plan --neo-model @/shards": "--neo-model",
    "plan --neo-model tiny --packs @/shards": "--packs",
    "convert_checkpoint hf-to-megatron --hf @/megatron --output @/o": "--hf",
    "convert_checkpoint megatron-to-hf --megatron @/neo --tokenizer @/tokenizer --output @/o": "--megatron",
    "convert_checkpoint qwen3-to-neo --qwen3 @/neo --pre-buffer-layers 1 --output @/o": "--qwen3",
    "convert_checkpoint attach-pre-buffer --pre-buffer @/neo --qwen3 @/qwen3 --output @/o": "--pre-buffer",
    "convert_checkpoint extract-pre-buffer --neo @/packs --output @/o": "--neo",
    "generate --model @/megatron --prompt a": "--model",
    "generate --model @/neo --prompt a --image @/nowhere.png": "--image",
    "evaluate --model @/neo --input @/nowhere.json --output @/o": "--input",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_tool_reports_a_wrong_path_before_loading_anything(room, command):
    tool, *arguments = command.replace("@", str(room)).split()
    slow = ("torch", "transformers", "megatron", "numpy", "PIL")
    code = (
        "import runpy, sys\n"
        f"for name in {slow}: sys.modules[name] = None\n"  # an import of one of them ends in an error
        f"sys.argv = {[tool, *arguments]!r}\n"
        f"runpy.run_path({str(ROOT / 'tools' / tool) + '.py'!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"{tool}: {COMMANDS[command]} {room}/"), sentence
    assert not (room / "o").exists()


def test_a_directory_that_cannot_be_written_is_reported(room, tmp_path):
    """Under a file, without rights to it or to a directory above it, and in object storage."""
    for path, sentence in (
        (room / "notes.txt" / "run", f"is below {room / 'notes.txt'}, which is a file: choose another directory"),
        (room / "notes.txt" / "a" / "run", "which is a file"),
        (
            "s3://bucket/run",
            "is object storage, to which only shards and packs are written: choose a directory of a file system",
        ),
    ):
        with pytest.raises(WrongPath) as raised:
            check_path(path, Wanted.OUTPUT, "--save")
        assert str(raised.value).startswith(f"--save {path} ") and sentence in str(raised.value)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        for path in (locked, locked / "run", locked / "a" / "run"):
            with pytest.raises(WrongPath, match="cannot be written: no permission for .*: choose another directory"):
                check_path(path, Wanted.OUTPUT, "--save")
    finally:
        if root:
            os.setresuid(0, 0, 0)
    check_path(tmp_path / "new" / "run", Wanted.OUTPUT, "--save")
    check_path(Path("new/run"), Wanted.OUTPUT, "--save")
