"""Shards and packs of version 0.1.0 are read as before, and the same bytes are written today."""

import hashlib
import json
from fractions import Fraction

import pytest
from support.paths import GOLDEN, TESTS

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify

FORMATS = TESTS / "data" / "formats"
EXPECTED = json.loads((FORMATS / "expected.json").read_text())
ITEM = (
    *("tokens", "positions_thw", "document", "image", "patches", "image_token_index"),
    *("target_index", "targets", "target_weight"),
)


def sha256(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


@pytest.fixture(params=["encoded", "patches"])
def store(request) -> str:
    return request.param


def test_samples_are_read(store):
    shards = ShardSet(FORMATS / store / "shards")
    assert len(shards) == len(EXPECTED[store]["samples"]) > 4
    for sample, expected in zip(shards.fetch(range(len(shards))), EXPECTED[store]["samples"], strict=True):
        assert sample.tokens.tolist() == expected["tokens"] and sample.spans.tolist() == expected["spans"]
        assert sample.grids.tolist() == expected["grids"]
        assert [sha256(image.tobytes()) for image in sample.images] == expected["images"]


def test_packs_are_read(store):
    packs = PackDataset(FORMATS / store / "packs", None, seed=1234)
    assert len(packs) == EXPECTED[store]["packs"]["count"]
    items = [packs[number] for number in range(len(packs))]
    assert (
        sha256(*(item[key].numpy().tobytes() for item in items for key in ITEM)) == EXPECTED[store]["packs"]["sha256"]
    )


@pytest.mark.parametrize("part", ["shards", "packs", "held-out"])
def test_nothing_is_damaged(store, part):
    assert not verify(str(FORMATS / store / part), 1).damage


def test_the_same_bytes_are_written_today(store, tmp_path):
    """Except for paths, which the manifest and the identities of image files have."""
    old = FORMATS / store
    source = Source("golden", str(old / "annotations.json"), str(GOLDEN))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=16384, image_store=store)
    preprocess([source], GOLDEN / "tokenizer", tmp_path / "shards", settings, max_rejected=50)
    write_packs(
        [PackInput(str(tmp_path / "shards"))], tmp_path / "packs", 192, held_out=HeldOut(Fraction(1, 4), tmp_path / "h")
    )
    written = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert written.keys() == {path.name for path in (old / "shards").iterdir()}
    for name in written.keys() - {"manifest.json", "00000.media.npy", "rejects.jsonl"}:
        assert written[name] == (old / "shards" / name).read_bytes(), name
    (new_reject,), (old_reject,) = (
        [json.loads(line) for line in (path / "shards" / "rejects.jsonl").read_text().splitlines()]
        for path in (tmp_path, old)
    )
    assert new_reject.keys() == old_reject.keys() and new_reject["kind"] == old_reject["kind"]
    for part in ("shards", "packs"):
        new, then = (json.loads((path / part / "manifest.json").read_text()) for path in (tmp_path, old))
        assert new.keys() == then.keys() and new["counts"].keys() == then["counts"].keys()
        assert new["format"] == then["format"] and new["version"] == then["version"]
    assert new["counts"]["samples_read"] == then["counts"]["samples_read"]
