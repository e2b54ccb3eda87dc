"""Files of a data set: globs, directories, data sets of Hugging Face, the output of img2dataset, and mixes."""

import json
import os
from pathlib import Path

import pytest

from neo_megatron.cli.source_options import add_sources, sources_of
from neo_megatron.data.prepare.input_files import annotation_files
from neo_megatron.data.prepare.registry import data_list
from neo_megatron.errors import DataError
from neo_megatron.paths import Wanted, WrongPath, check_flags

CONTENTS = {
    ".json": b"[]",
    ".jsonl": b"{}\n",
    ".parquet": b"PAR1" + bytes(20) + b"\0\0\0\0PAR1",
    ".tar": bytes(257) + b"ustar\0" + bytes(300),
    ".arrow": b"\xff\xff\xff\xff" + bytes(20),
}


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENTS.get(path.suffix, b"text"))
    return root


def names(path: Path | str, root: Path) -> list[str]:
    return [os.path.relpath(file, root) for file in annotation_files(str(path))]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["b.jsonl", "a.jsonl", "B.jsonl", "10.jsonl", "9.jsonl"],
            ["10.jsonl", "9.jsonl", "B.jsonl", "a.jsonl", "b.jsonl"],
        ),
        (["a.json", "b.jsonl"], ["a.json", "b.jsonl"]),
        (["00001.tar", "00000.tar"], ["00000.tar", "00001.tar"]),
        (
            ["00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "00001.parquet", "00001_stats.json"],
            ["00000.tar", "00001.tar"],
        ),
        (
            [
                "README.md",
                ".gitattributes",
                "LICENSE",
                "dataset_infos.json",
                "data/train-1.parquet",
                "data/train-0.parquet",
            ],
            ["data/train-0.parquet", "data/train-1.parquet"],
        ),
        (
            ["default/train/0000.parquet", "default/train/0001.parquet"],
            [f"default/train/000{n}.parquet" for n in range(2)],
        ),
        (["_SUCCESS", "part-0.parquet", ".part-0.parquet.crc"], ["part-0.parquet"]),
        ([".nv-meta/split.yaml", "a.tar", "a.tar.idx"], ["a.tar"]),
    ],
)
def test_the_files_of_a_directory_are_sorted_by_code_point(tmp_path, files, expected):
    assert names(make(tmp_path, *files), tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "is an empty directory"),
        (["README.md"], "is an empty directory"),
        (
            ["a.json", "b.parquet"],
            r"holds JSON \(a.json\) and Parquet \(b.parquet\); name what to read, such as '.*/\*.json'",
        ),
        (["a.json", "0.png"], "holds 0.png, which is not an annotation file; name what to read"),
        (["a.json", "images/0.png"], "holds files and the directories images; name what to read"),
        (["en/a.parquet", "fr/a.parquet"], "holds the directories en, fr; name what to read, such as '.*/en'"),
        (
            ["data/train-0.parquet", "data/test-0.parquet"],
            r"holds the splits test, train; name what to read, such as '.*test\*'",
        ),
        (["dataset_dict.json", "train/a.arrow", "test/b.arrow"], "holds the splits test, train; name"),
    ],
)
def test_a_directory_that_cannot_be_decided_is_rejected(tmp_path, files, sentence):
    with pytest.raises(DataError, match=rf"^data set web: .*{sentence}"):
        annotation_files(str(make(tmp_path, *files)), "data set web:")


def test_globs_are_expanded_unless_a_file_has_that_name(tmp_path):
    make(tmp_path, "b.jsonl", "a.jsonl", "c.parquet", "sub/d.jsonl", "[x].json")
    assert names(tmp_path / "*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl", "sub/d.jsonl"]
    assert names(tmp_path / "[x].json", tmp_path) == ["[x].json"]
    for pattern, sentence in (("*.zip", "matches no file"), ("s*", "matches the directory"), ("?.*", "holds JSON")):
        with pytest.raises(DataError, match=sentence):
            annotation_files(str(tmp_path / pattern))


@pytest.mark.parametrize(
    "listed",
    [None, 5, [], ["a"], [{"filename": "../a.arrow"}], [{"filename": "/etc/passwd"}], [{}], [{"filename": ".."}]],
)
def test_a_state_that_lists_other_files_is_rejected(tmp_path, listed):
    make(tmp_path, "dataset_info.json", "a.arrow")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    with pytest.raises(DataError, match=r"state\.json does not list"):
        annotation_files(str(tmp_path))


def test_a_state_lists_the_files_in_order(tmp_path):
    make(tmp_path, "dataset_info.json", "a.arrow", "b.arrow", "cache.arrow")
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]})
    )
    assert names(tmp_path, tmp_path) == ["b.arrow", "a.arrow"]


def parsed(*words: str):
    import argparse

    parser = argparse.ArgumentParser()
    add_sources(parser)
    return sources_of(parser.parse_args(["--input", *words]))


def test_inputs_become_sources_of_one_data_set(tmp_path):
    make(tmp_path, "web/b.jsonl", "web/a.jsonl", "c.json")
    sources = parsed(str(tmp_path / "web"), str(tmp_path / "c.json"))
    assert [(it.name, os.path.basename(it.annotations)) for it in sources] == [
        ("web", f) for f in ("a.jsonl", "b.jsonl", "c.json")
    ]
    assert {it.name for it in parsed(str(tmp_path / "web" / "*.jsonl"))} == {"web"}
    (tmp_path / "c.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert [it.name for it in parsed(str(tmp_path / "c.json"))] == ["c"]
    with pytest.raises(DataError, match=r"--input names .*a\.jsonl twice; name it once"):
        parsed(str(tmp_path / "web"), str(tmp_path / "web" / "*.jsonl"))
    with pytest.raises(WrongPath, match="missing.json does not exist"):
        parsed(str(tmp_path / "missing.json"))


def test_a_registry_has_globs_and_directories(tmp_path):
    make(tmp_path, "web/b.jsonl", "web/a.jsonl", "docs/x.json", "docs/y.json")
    (tmp_path / "registry.yaml").write_text("web: {annotation_path: web}\ndocs: {annotation_path: docs/*.json}\n")
    sources = data_list(["docs%50", "web"], tmp_path / "registry.yaml")
    assert [(it.name, os.path.basename(it.annotations)) for it in sources] == [
        *(("docs", name) for name in ("x.json", "y.json")),
        *(("web", name) for name in ("a.jsonl", "b.jsonl")),
    ]


def test_paths_are_checked_before_slow_imports(tmp_path):
    make(tmp_path, "web/a.jsonl", "registry.yaml")
    flags = {"--input": Wanted.ANNOTATION_FILES}
    for path in ("web", "web/a.jsonl", "web/*.jsonl"):
        check_flags(["--input", str(tmp_path / path)], flags)
    for path, sentence in (("no", "does not exist"), ("registry.yaml", "is a YAML file, not annotation files")):
        with pytest.raises(WrongPath, match=sentence):
            check_flags(["--input", str(tmp_path / path)], flags)
