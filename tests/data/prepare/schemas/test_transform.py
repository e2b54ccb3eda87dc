"""Functions of users: what they return is checked like any record, what they raise rejects the record."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest

from neo_megatron.data.manifest import read_manifest
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.transform import load_transform, source_sha256, transformed
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError, RejectedSample

MODULE = """
def ask(record):
    if record["answer"] == "none":
        return None
    if record["answer"] == "many":
        return [turns(record["question"], str(number)) for number in range(3)] + [turns("", "")]
    return turns(record["question"], record["answer"])


def turns(question, answer):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


NAME = "not a function"
"""


@pytest.fixture
def module(bench, monkeypatch):
    """The name of a function in a module of the current directory."""
    name = f"transform_of_{bench.path.name}"
    (bench.path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(bench.path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield f"{name}:ask"
    sys.modules.pop(name, None)


def write(bench, records, transform, output="shards", workers=1):
    options = SchemaOptions(transform=transform)
    source = Source("train", str(bench.annotations(records, "asked.jsonl")), schema=options)
    preprocess([source], bench.tokenizer, bench.path / output, bench.settings, workers=workers)
    return ShardSet(bench.path / output)


@pytest.mark.parametrize("workers", [1, 2])
def test_its_records_are_those_of_the_published_form(bench, module, samples_of, new_sample, workers):
    records = [
        {"question": "Hi", "answer": "Hello!"},
        {"question": "Why", "answer": "none"},
        {"question": "Count", "answer": "many"},
        {"question": "Hi"},
    ]
    shards = write(bench, records, module, workers=workers)
    plain = [new_sample("Hi", "Hello!"), [new_sample("Count", str(number)) for number in range(3)]]
    assert samples_of(shards) == samples_of(bench.preprocess(plain, "plain"))
    assert [(reject["record"], reject["element"], reject["reason"]) for reject in bench.rejects()] == [
        (1, None, f"{module} returned no record"),
        (2, 3, "turn 1 is an empty answer; correct it, or pass --empty-answers keep"),
        (3, None, f"{module} failed with KeyError: 'answer'"),
    ]
    counts = read_manifest(bench.path / "shards", "neo-shards", 3)["counts"]
    assert (counts["samples_read"], counts["samples_kept"], counts["samples_rejected"]) == (7, 4, 3)


def test_samples_of_lists_are_numbered_as_they_come(bench, module):
    records = [[{"question": "Hi"}], [{"question": "A", "answer": "many"}, {"question": "B"}]]
    shards = write(bench, records, module)
    assert [(reject["record"], reject["element"]) for reject in bench.rejects()] == [(0, 0), (1, 3), (1, 4)]
    assert len(shards) == 3


def test_another_source_is_another_run(bench, module):
    write(bench, [{"question": "Hi", "answer": "Hello!"}], module)
    (source,) = read_manifest(bench.path / "shards", "neo-shards", 3)["sources"]
    assert source["transform"] == module and source["transform_sha256"] == source_sha256(module)
    (bench.path / f"{module.partition(':')[0]}.py").write_text(MODULE + "\n")
    assert source["transform_sha256"] != source_sha256(module)
    with pytest.raises(DataError, match="its source file has changed"):
        load_transform(module, source["transform_sha256"])
    # Python keeps what it has imported, so the new source would not be run.
    with pytest.raises(DataError, match="its source file has changed since it was imported; restart Python"):
        load_transform(module, source_sha256(module))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("json.dumps", "must have the form package.module:function"),
        ("../a:b", "must have the form package.module:function"),
        ("no_such_module_here:f", "is not a Python file on the path"),
        ("no_such_package_here.module:f", "cannot be imported: ModuleNotFoundError"),
        ("sys:exit", "is not a Python file on the path"),
        ("json:no_such_function", "json does not have a function no_such_function"),
    ],
)
def test_a_function_that_cannot_be_found_is_reported(name, sentence):
    with pytest.raises(DataError, match=sentence):
        load_transform(name, source_sha256(name))


def test_names_that_are_not_functions_and_modules_that_fail_are_reported(bench, module):
    other = module.replace(":ask", ":NAME")
    with pytest.raises(DataError, match="does not have a function NAME"):
        load_transform(other, source_sha256(other))
    (bench.path / "transform_that_fails.py").write_text("raise ValueError('not\\nhere')")
    with pytest.raises(DataError, match="cannot be imported: ValueError: not here; correct the module"):
        load_transform("transform_that_fails:f", source_sha256("transform_that_fails:f"))


@dataclass(frozen=True)
class StoredFile:
    """A file in an archive."""

    path: str


CIRCLE: dict = {}
CIRCLE["circle"] = CIRCLE


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "returned no record"),
        ([], "returned no record"),
        (np.zeros(3), "returned ndarray, not an object or a list of them"),
        ({"image": np.zeros(3)}, "is not JSON: TypeError: it has a ndarray"),
        ("text", "returned str, not an object or a list of them"),
        ([{}, 3], "returned int, not an object or a list of them"),
        ({"image": {1, 2}}, "is not JSON: TypeError: it has a set"),
        ({"image": b"\x89PNG"}, "is not JSON: TypeError: it has a bytes"),
        (CIRCLE, "is not JSON: ValueError"),
        ({1: "a"}, "a key that is not a string"),
        ({"conversations": [{1: "a"}]}, "a key that is not a string"),
    ],
)
def test_anything_but_records_rejects_the_record(returned, sentence):
    with pytest.raises(RejectedSample) as raised:
        transformed(lambda _: returned, "a:b", {})
    assert sentence in raised.value.sentence


def test_only_objects_are_given_to_a_function():
    with pytest.raises(RejectedSample, match="a record must be an object, not str"):
        transformed(pytest.fail, "a:b", "text")


def test_files_of_archives_are_passed_on():
    record = {"image": StoredFile("a.png")}
    assert transformed(lambda given: given, "a:b", record) == [record]
