"""Every way of loading makes the same model inputs of the same pairs, and ours resumes; peers only if installed."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from neo_megatron.benchmarks import peers
from neo_megatron.benchmarks.peers import child
from neo_megatron.benchmarks.peers.pairs import read_pairs
from neo_megatron.benchmarks.peers.ways import OURS, WAYS, Way
from neo_megatron.benchmarks.peers.work import Work, header

PAIRS = 120  # in two tars
LENGTH = 1024


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers") / "inputs"
    pixels = np.random.default_rng(0)
    images = []
    for width, height in ((320, 256), (256, 320), (400, 256)):
        file = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (height, width, 3), np.uint8)).save(file, "JPEG")
        images.append(file.getvalue())
    peers.write_inputs(images, root, PAIRS, LENGTH)
    return root


@pytest.mark.parametrize("name", WAYS)
def test_a_way_reads_each_pair_once_as_the_same_inputs(root, name):
    way = WAYS[name]
    if not way.installed:
        pytest.skip(f"needs {way.package}")
    work = Work(root / "tokenizer.json")
    assert child.prepare(way, name, root, work)["seconds"] >= 0
    found = child.epoch(way, name, root, work)
    assert sorted(number for pack in found["packs"] for number in pack) == list(range(PAIRS))
    samples = [work.sample(number, header(image), caption) for number, image, caption in read_pairs(root / "tars")]
    assert found["tokens"] == sum(len(sample.tokens) for sample in samples)
    assert found["checksum"] == sum(int(sample.tokens.sum()) + int(sample.patches.sum()) for sample in samples)
    resumed = child.resume(way, name, root, work)["packs"]
    assert resumed and 0 < found["middle"] < len(found["packs"])
    if name in OURS:
        assert peers.what_follows(found, resumed) == "the same packs"


def test_what_follows_counts_lost_and_repeated_pairs():
    uninterrupted = {"packs": [[0, 1], [2, 3], [4, 5]], "middle": 1}
    assert peers.what_follows(uninterrupted, [[2, 3], [4, 5]]) == "the same packs"
    assert peers.what_follows(uninterrupted, [[3], [5, 1]]) == "other packs: 2 pairs lost, 1 read again"


def test_ways_that_differ_are_found():
    def epoch(checksum: int, packs: list[list[int]]) -> dict:
        return {"epoch": [{"tokens": 7, "checksum": checksum, "packs": packs}]}

    peers.check_same_inputs({"a": epoch(1, [[0, 1]]), "b": epoch(1, [[1], [0]]), "lost one": epoch(2, [[0]])}, 2)
    with pytest.raises(AssertionError, match="same model inputs"):
        peers.check_same_inputs({"a": epoch(1, [[0, 1]]), "b": epoch(2, [[0, 1]])}, 2)


def test_the_table_names_what_is_not_installed(root):
    absent = Way("Another loader", ("none", "Loader"), "another-loader", "another_loader")
    table = peers.compare(root, {"encoded": OURS["encoded"], "absent": absent}, repeats=1)
    heading, _, ours, _, sentence = table.split("\n")
    assert ours.startswith("| ours, `encoded` | ") and ours.count("|") == heading.count("|")
    assert 50 < float(ours.split(" | ")[3].rstrip("%")) <= 100, "filled"
    assert "the same packs" in ours and json.loads((root / "pairs.json").read_text()) == PAIRS
    assert sentence.startswith("Another loader was not run, because another-loader is not installed")
