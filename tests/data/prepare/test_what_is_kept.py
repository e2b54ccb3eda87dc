"""Reports of preprocessing: kept and rejected samples, ignored keys, and the limit of rejects."""

import dataclasses
import json
import shutil

import pytest

from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.tallies import MAX_NAMES, OTHERS
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError, Reason, TooManyRejected


def run(bench, file, *, root="images", output="shards", **options):
    (bench.path / root).mkdir(exist_ok=True)
    source = Source("train", str(file), str(bench.path / root))
    return preprocess([source], bench.tokenizer, bench.path / output, bench.settings, **options)


def test_the_manifest_counts_findings_in_kept_samples(bench, new_sample, directory_bytes):
    """The same for any number of workers, with names up to a limit."""
    bench.images("a.png")
    records = [new_sample("<image>", "x", image="a.png", note="n", id=number) for number in range(5)]
    records += [new_sample("<|image_pad|> what", "x", images=["a.png"])] * 2
    records += [[new_sample(), new_sample("<img> what", "x", image="a.png")]]
    records += [new_sample("<image>", "x", unseen="this sample is rejected")]
    records += [new_sample(**{f"k{number}": 1}) for number in range(100)]
    file = bench.annotations(records)
    settings = dataclasses.replace(bench.settings, records_per_shard=7)
    shards = bench.preprocess(file, settings=settings, workers=1)
    bench.preprocess(file, "two", settings=settings, workers=2)
    assert directory_bytes(bench.path / "two") == directory_bytes(bench.path / "shards")
    counts = shards.manifest["counts"]
    assert (counts["samples_kept"], counts["samples_with_images"]) == (109, 8)
    keys = counts["ignored_keys"]
    assert keys["note"] == 5 and "id" not in keys and "unseen" not in keys
    assert len(keys) == MAX_NAMES + 1 and sum(keys.values()) == 105 and keys[OTHERS] == 101 - MAX_NAMES
    assert counts["foreign_placeholders"] == {
        "<img>": {"samples": 1, "file": str(file), "record": 7, "element": 1},
        "<|image_pad|>": {"samples": 2, "file": str(file), "record": 5, "element": None},
    }


def test_empty_answers_are_rejected_or_kept_and_counted(bench, new_sample):
    records = [new_sample("a", "b"), new_sample("a", " \n"), new_sample("a", "")]
    assert bench.preprocess(records).manifest["counts"]["rejected_by_reason"] == {Reason.EMPTY_ANSWER: 2}
    kept = dataclasses.replace(bench.settings, empty_answers="keep")
    counts = bench.preprocess(records, "kept", settings=kept).manifest["counts"]
    assert (counts["samples_kept"], counts["samples_rejected"], counts["empty_answers"]) == (3, 0, 2)


def test_after_too_many_rejects_the_same_call_completes_the_shards(bench, new_sample, directory_bytes, monkeypatch):
    file = bench.annotations([new_sample()] * 97 + [new_sample(image="no.png")] * 2 + [{}])
    with pytest.raises(
        TooManyRejected, match=r"3 of 100 samples \(3\.00%\) were rejected, more than --max-rej"
    ) as raised:
        run(bench, file, max_rejected=2.9)
    assert raised.value.counts["rejected_by_reason"] == {"empty conversation": 1, "missing picture": 2}
    assert "2 of them name an image or video that is not found, so check --image-root" in str(raised.value)
    assert len(bench.rejects()) == 3
    with pytest.raises(DataError, match="holds an unfinished data set"):
        write_packs([PackInput(str(bench.path / "shards"))], bench.path / "packs", 64)
    monkeypatch.setattr("neo_megatron.data.prepare.worker.SliceWorker.run", None)  # nothing is done a second time
    assert run(bench, file, max_rejected=3)["counts"]["samples_rejected"] == 3
    monkeypatch.undo()
    run(bench, file, output="at_once")
    assert directory_bytes(bench.path / "shards") == directory_bytes(bench.path / "at_once")


def test_a_wrong_image_root_ends_the_command(bench, new_sample, run_tool):
    bench.images("a.png")
    records = [new_sample("<image>", "x", image="a.png")] * 53 + [new_sample(note=1)] * 8
    (bench.path / "wrong").mkdir()
    flags = ["--input", bench.annotations(records), "--tokenizer", bench.tokenizer, "--workers", 1]
    done = run_tool("preprocess_data.py", *flags, "--image-root", bench.path / "wrong", "--output", bench.path / "s")
    assert done.returncode == 3 and not (bench.path / "s" / "manifest.json").exists()
    assert "kept 8 samples: 0 with images, 8 without" in done.stdout and "rejected 53: missing picture" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("preprocess_data: 53 of 61 samples (86.89%) were rejected") and "check --image-root" in last
    right = ["--image-root", bench.path / "images", "--output", bench.path / "t"]
    done = run_tool("preprocess_data.py", *flags, *right)
    assert done.returncode == 0 and "kept 61 samples: 53 with images, 8 without" in done.stdout
    assert "ignored keys of samples kept, which nothing reads: 'note' in 8" in done.stdout
    done = run_tool("preprocess_data.py", *flags, "--output", bench.path / "u", "--max-rejected", "101")
    assert done.returncode == 2 and "--max-rejected must be from 0 to 100 percent, not 101" in done.stderr


@pytest.mark.parametrize("records_per_shard", [1, 3, 8192])
def test_all_lists_of_rejects_have_rows_of_the_same_form(bench, new_sample, records_per_shard):
    """With the element in a list-packed record, even if samples before it were rejected."""
    long, bad = new_sample("word " * 80, "x"), {}
    records = [bad, [new_sample(), bad], long, [bad, long, new_sample(), bad, long], [new_sample(), long], [bad, long]]
    bench.preprocess(records, settings=dataclasses.replace(bench.settings, records_per_shard=records_per_shard))
    bench.pack(128)
    rows = bench.rejects() + bench.rejects("packs")
    empty, over_long = "empty conversation", "over-long sample"
    assert [(row["record"], row["element"], row["kind"]) for row in rows] == [
        *((0, None, empty), (1, 1, empty), (3, 0, empty), (3, 3, empty), (5, 0, empty)),
        *((2, None, over_long), (3, 1, over_long), (3, 4, over_long), (4, 1, over_long), (5, 1, over_long)),
    ]
    assert all(list(row) == ["file", "record", "element", "kind", "reason"] for row in rows)
    with pytest.raises(DataError, match=r"train\.json, record 2: the sample has \d+ tokens, more than the 128"):
        write_packs([PackInput(str(bench.path / "shards"))], bench.path / "p", 128, on_error="fail")


@pytest.mark.parametrize("name", ["50%", "a%20b %s", "100%"])
def test_directories_may_have_a_percent_sign(bench, new_sample, run_tool, name):
    """From annotations to packs, on the command line."""
    bench.images("a.png")
    place = bench.path / name
    shutil.copytree(bench.path / "images", place / "im%ages")
    shutil.copytree(bench.tokenizer, place / "token%izer")
    (place / "tr%ain.json").write_text(json.dumps([new_sample("<image>", "x", image="a.png")] * 8))
    (place / "r%.yaml").write_text("a: {annotation_path: 'tr%ain.json', data_path: 'im%ages'}\n")
    tokenizer = ["--tokenizer", place / "token%izer", "--workers", 1]
    for source, output in (
        (["--input", place / "tr%ain.json", "--image-root", place / "im%ages"], "shards%50"),
        (["--registry", place / "r%.yaml", "--datasets", "a%50"], "half%"),
    ):
        done = run_tool("preprocess_data.py", *source, *tokenizer, "--output", place / output)
        assert done.returncode == 0, done.stderr
    shards = place / "shards%50"
    done = run_tool("pack_data.py", "--data", shards, f"{shards}%50", "--output", place / "packs%", "--seq-length", 256)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "packs%" / "manifest.json").read_text())
    assert [entry["share"] for entry in manifest["data"]] == ["1", "1/2"]
    assert len(ShardSet(place / "half%")) == 4
    assert run_tool("verify_data.py", "--data", place / "packs%", "--workers", 1).returncode == 0


def test_a_byte_order_mark_is_not_part_of_the_first_record(bench, new_sample, samples_of):
    records = [new_sample("a", "b"), new_sample("c", "d")]
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    for name, content in (("a.jsonl", lines), ("b.json", json.dumps(records).encode())):
        (bench.path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert samples_of(bench.preprocess(bench.path / name, name[0])) == samples_of(
            bench.preprocess(records, f"plain_{name[0]}")
        )
