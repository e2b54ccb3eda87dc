"""Preprocessing from annotations to shards: kept and rejected samples, and reproducible bytes."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError, Reason


def mixed_records(new_sample, count: int) -> list:
    """Good and bad records of every form, in a fixed order."""
    forms = [
        new_sample("<image>\nWhat?", "An image.", image="a.png"),
        new_sample("What?", "That.", image=["b.png"]),
        new_sample(),
        [new_sample("a", "b"), new_sample("<image>", "c", image="a.png")],
        new_sample("<image><image>", "two", image=["a.png", "b.png"]),
        new_sample("<image>", "d", image="missing.png"),
        {"conversations": [{"from": "system", "value": "s"}, *new_sample("x", "y", "z", "w")["conversations"]]},
    ]
    return [forms[number % len(forms)] for number in range(count)]


RUN = """
import sys
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.config import PreprocessConfig

preprocess([Source("a", sys.argv[1])], sys.argv[2], sys.argv[3], PreprocessConfig(min_pixels=1024, max_pixels=65536))
print({"torch", "transformers", "megatron"} & {*sys.modules})
"""


def test_torch_and_transformers_do_not_stay_loaded(bench, new_sample, directory_bytes):
    """They would cost each worker seconds and half a gigabyte; a separate process reads the tokenizer."""
    file = bench.annotations([new_sample()])
    command = [sys.executable, "-c", RUN, str(file), str(bench.tokenizer), str(bench.path / "alone")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    preprocess([Source("a", str(file))], bench.tokenizer, bench.path / "here", bench.settings)
    assert directory_bytes(bench.path / "alone") == directory_bytes(bench.path / "here")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_same_bytes_for_any_number_of_workers_and_again(bench, new_sample, directory_bytes, name):
    bench.images("a.png", "b.png")
    file = bench.annotations(mixed_records(new_sample, 40), name)
    settings = dataclasses.replace(bench.settings, records_per_shard=7, image_store="patches")
    for output, workers in (("one", 1), ("again", 1), ("two", 2)):
        bench.preprocess(file, output, settings, workers=workers)
    one = directory_bytes(bench.path / "one")
    assert len([key for key in one if key.endswith("tokens.bin")]) == 6
    assert one == directory_bytes(bench.path / "again")
    assert one == directory_bytes(bench.path / "two")


def test_array_and_lines_give_the_same_samples(bench, new_sample, samples_of):
    bench.images("a.png", "b.png")
    records = mixed_records(new_sample, 20)
    array = bench.preprocess(bench.annotations(records, "a.json"), "array")
    lines = bench.preprocess(bench.annotations(records, "a.jsonl"), "lines")
    assert samples_of(array) == samples_of(lines)


def test_both_image_stores_give_the_same_items(bench, new_sample, new_png):
    bench.images("a.png", "b.png")
    (bench.path / "images" / "b.png").write_bytes(new_png(90, 50, 5, "P"))
    packs = []
    for store in ("encoded", "patches"):
        settings = dataclasses.replace(bench.settings, image_store=store)
        bench.preprocess(mixed_records(new_sample, 10), store, settings)
        packs.append(PackDataset(bench.pack(128, data=store, output=f"packs_{store}"), 20, seed=1))
    for encoded, patches in zip(*packs, strict=True):
        assert encoded.keys() == patches.keys()
        assert all(np.array_equal(encoded[key], patches[key]) for key in encoded)
        assert len(encoded["patches"]) == len(encoded["image_token_index"])


def test_several_images_share_a_pixel_limit(bench, new_sample, new_png):
    bench.images("a.png")
    (bench.path / "images" / "a.png").write_bytes(new_png(512, 512))
    settings = dataclasses.replace(bench.settings, max_pixels=128 * 128)
    shards = bench.preprocess(
        [new_sample("<image>" * count, "ok", image=["a.png"] * count) for count in (1, 2, 8)], settings=settings
    )
    assert shards.shard(0).grids.tolist() == [[8, 8]] * 3 + [[4, 4]] * 8


BAD = {
    "truncated.png": Reason.UNREADABLE_IMAGE,
    "text.png": Reason.UNREADABLE_IMAGE,
    "empty.png": Reason.UNREADABLE_IMAGE,
    "missing.png": Reason.MISSING_IMAGE,
    "folder": Reason.MISSING_IMAGE,
    "pipe": Reason.MISSING_IMAGE,
    "long.png": Reason.ASPECT_RATIO,
    "../train.json": Reason.OUTSIDE_ROOT,
    "http://example.org/a.png": Reason.REMOTE_PATH,
}


def bad_images(bench, new_png) -> None:
    folder = bench.path / "images"
    bench.images("a.png")
    (folder / "truncated.png").write_bytes(new_png()[:600])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "long.png").write_bytes(new_png(2, 500))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")  # reading it would wait for ever


@pytest.mark.parametrize("store", ["encoded", "patches"])
def test_each_bad_image_is_rejected_with_its_reason(bench, new_sample, new_png, samples_of, store):
    bad_images(bench, new_png)
    good = [new_sample("<image>", "first", image="a.png"), new_sample("last", "one")]
    records = [good[0], *(new_sample("<image>", "bad", image=path) for path in BAD), good[1]]
    settings = dataclasses.replace(bench.settings, image_store=store)
    shards = bench.preprocess(records, settings=settings)
    rejects = bench.rejects()
    assert [(entry["record"], entry["kind"]) for entry in rejects] == list(enumerate(BAD.values(), start=1))
    assert all(entry["file"].endswith("train.json") and entry["reason"] for entry in rejects)
    assert samples_of(shards) == samples_of(bench.preprocess(good, "good", settings))
    counts = shards.manifest["counts"]
    assert counts["samples_kept"] + counts["samples_rejected"] == counts["samples_read"] == len(records)
    assert sum(counts["rejected_by_reason"].values()) == len(BAD)


def test_a_bad_element_does_not_reject_the_rest_of_its_list(bench, new_sample):
    shards = bench.preprocess([[new_sample("a", "b"), {"conversations": []}, new_sample("c", "d")], [], [[]]])
    assert [(entry["record"], entry["element"], entry["kind"]) for entry in bench.rejects()] == [
        (0, 1, Reason.EMPTY_CONVERSATION),
        (1, None, Reason.MALFORMED),
        (2, 0, Reason.MALFORMED),
    ]
    assert shards.manifest["counts"]["samples_read"] == 5 and len(shards) == 2
    assert shards.shard(0).tokens.documents.tolist() == [0, 2]


def test_broken_json_rejects_only_the_broken_record(bench, new_sample):
    lines = [json.dumps(new_sample("a", "b")), "{broken", "", json.dumps(new_sample("c", "d")), '{"conversations": [']
    (bench.path / "lines.jsonl").write_text("\n".join(lines))
    shards = bench.preprocess(bench.path / "lines.jsonl", "lines")
    assert len(shards) == 2
    assert [(entry["record"], entry["kind"]) for entry in bench.rejects("lines")] == [
        (1, Reason.BROKEN_JSON),
        (3, Reason.BROKEN_JSON),
    ]
    (bench.path / "array.json").write_text("[" + lines[0] + ", " + lines[3] + ", " + lines[4])
    shards = bench.preprocess(bench.path / "array.json", "array")
    assert len(shards) == 2
    assert [(entry["record"], entry["kind"]) for entry in bench.rejects("array")] == [(2, Reason.BROKEN_JSON)]
    assert shards.manifest["counts"]["samples_read"] == 3


def test_a_slice_without_usable_samples_has_no_shard(bench):
    shards = bench.preprocess([{}, {}])
    assert len(shards) == 0 and len(shards.entries) == 0
    assert sorted(path.name for path in (bench.path / "shards").iterdir()) == ["manifest.json", "rejects.jsonl"]
    with pytest.raises(DataError, match="would be empty"):
        bench.pack(64)


@pytest.mark.parametrize("workers", [1, 2])
def test_fail_stops_at_the_first_bad_record_in_order(bench, new_sample, workers):
    records = bench.annotations([new_sample()] * 5 + [new_sample(image="missing.png")] + [{}] * 6)
    settings = dataclasses.replace(bench.settings, records_per_shard=2)
    with pytest.raises(DataError, match=r"train\.json, record 5: the image .*missing\.png") as raised:
        bench.preprocess(records, settings=settings, on_error="fail", workers=workers)
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="holds an unfinished data set"):
        ShardSet(bench.path / "shards")
    assert len(bench.preprocess(records, settings=settings)) == 5  # what was done is continued


def test_the_command_ends_with_the_error(bench, new_sample, run_tool):
    file = bench.annotations([new_sample(), [new_sample(), new_sample("<image>", "x")]])
    done = run_tool(
        "preprocess_data.py",
        "--input",
        file,
        "--tokenizer",
        bench.tokenizer,
        "--output",
        bench.path / "s",
        "--on-error",
        "fail",
        "--workers",
        1,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"preprocess_data: {file}, record 1, sample 1: the sample has 0 images"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--engine", "spark"], "invalid choice: 'spark'"),
        (["--check", "no"], "invalid choice: 'no'"),
        (["--min-pixels", "0"], "--min-pixels is 0: it must be above 0"),
        (["--max-frames", "0"], "--max-frames must be at least 1"),
        (
            ["--tokenizer", "tests/data"],
            "is a directory of other files, not a tokenizer: give a directory with a tokenizer",
        ),
    ],
)
def test_wrong_flags_are_rejected(bench, golden, run_tool, flags, sentence):
    file = bench.annotations([])
    done = run_tool(
        "preprocess_data.py", "--input", file, "--tokenizer", golden / "tokenizer", "--output", bench.path / "s", *flags
    )
    assert done.returncode and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_finished_data_and_other_files_are_never_overwritten(bench, new_sample, directory_bytes):
    bench.preprocess([new_sample()])
    before = directory_bytes(bench.path / "shards")
    with pytest.raises(DataError, match="already holds a data set"):
        bench.preprocess([new_sample(), new_sample()])
    assert directory_bytes(bench.path / "shards") == before
    (bench.path / "mine").mkdir()
    (bench.path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        bench.preprocess([new_sample()], "mine")
    assert (bench.path / "mine" / "thesis.txt").read_text() == "years of work"


def test_registry_mixes_data_sets_by_share(bench, new_sample, samples_of, new_png):
    for name in ("a", "b"):
        bench.annotations([new_sample(f"{name}{n}", "ok") for n in range(20)], f"{name}.jsonl")
    bench.images("p.png")
    bench.annotations([new_sample("<image>", "see", image="p.png")], "c.json")
    entries = {"a": ("a.jsonl", ""), "b": ("b.jsonl", ""), "c": ("c.json", "images")}
    registry = bench.path / "registry.yaml"
    registry.write_text(
        "".join(f"{key}: {{annotation_path: {file}, data_path: '{root}'}}\n" for key, (file, root) in entries.items())
    )

    def run(output, *names):
        preprocess(data_list(names, registry), bench.tokenizer, bench.path / output, bench.settings)
        return ShardSet(bench.path / output)

    mixed = run("mixed", "a%25", "b%150", "c%200")
    assert np.bincount(np.concatenate([mixed.shard(n).samples["source"] for n in range(3)])).tolist() == [5, 30, 2]
    assert samples_of(mixed)[:5] == samples_of(run("alone", "a%25"))
    assert [source["share"] for source in mixed.manifest["sources"]] == ["1/4", "3/2", "2"]
    # Twice the same record is two records: packing need not keep the copies together.
    assert mixed.shard(2).tokens.documents.tolist() == [0, 1, 2]
