"""A meta file of InternVL is a registry: root, annotation and repeat_time mean what they mean there."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError

# As in InternVL's shell/data, with a data set of its own.
ENTRY = {"root": "images", "annotation": "train.jsonl", "data_augment": False, "repeat_time": 1, "length": 2}


def meta(directory: Path, **entries: dict) -> Path:
    (directory / "images").mkdir(exist_ok=True)
    (directory / "train.jsonl").write_text("{}\n")
    path = directory / "meta.json"
    path.write_text(json.dumps(entries, indent=2))
    return path


@pytest.mark.parametrize(("repeat", "share"), [(1, 1), (3, 3), (0.5, Fraction(1, 2)), (0.1, Fraction(1, 10))])
def test_its_entries_are_data_sets_with_a_share(tmp_path, repeat, share):
    path = meta(tmp_path, web=ENTRY | {"repeat_time": repeat}, docs=ENTRY)
    (web, docs) = data_list(["web", "docs%50"], path)
    assert web == Source("web", str(tmp_path / "train.jsonl"), str(tmp_path / "images"), Fraction(share))
    assert docs.share == Fraction(1, 2)


def test_its_records_are_drawn_as_often_as_it_says(bench, new_sample, samples_of):
    records = [new_sample(f"Question {number}", "Answer", image="a.png") for number in range(4)]
    bench.images("a.png")
    bench.annotations(records, "train.jsonl")
    path = bench.path / "meta.json"
    path.write_text(json.dumps({"web": ENTRY | {"repeat_time": 2}, "half": ENTRY | {"repeat_time": 0.5}}))
    preprocess(data_list(["web", "half"], path), bench.tokenizer, bench.path / "shards", bench.settings)
    plain = samples_of(bench.preprocess(records, "plain"))
    stored = samples_of(ShardSet(bench.path / "shards"))
    assert len(stored) == 8 + 2 and all(stored[:8].count(sample) == 2 for sample in plain)
    assert all(sample in plain for sample in stored[8:])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"data_augment": True}, "data_augment is not a property of a data set here; .* --min-jpeg-quality"),
        ({"max_dynamic_patch": 6}, "data set web in .* has max_dynamic_patch, which is not supported"),
        ({"repeat_time": 0}, "repeat_time must be a number above 0"),
        ({"repeat_time": True}, "repeat_time must be a number above 0"),
        ({"repeat_time": "2"}, "repeat_time must be a number above 0"),
        ({"annotation": ["a"]}, "must be strings"),
    ],
)
def test_what_is_not_supported_is_rejected(tmp_path, keys, sentence):
    with pytest.raises(DataError, match=sentence):
        data_list(["web"], meta(tmp_path, web=ENTRY | keys))


def test_a_registry_of_this_project_does_not_have_its_keys(tmp_path):
    path = meta(tmp_path, web={"annotation_path": "train.jsonl", "repeat_time": 2})
    with pytest.raises(DataError, match="correct its keys"):
        data_list(["web"], path)
