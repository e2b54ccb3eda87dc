"""The files of shards: Megatron can open them, and damage is found."""

import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.paths import ROOT

from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError


@pytest.fixture
def shards(bench, new_sample) -> ShardSet:
    """Two shards: a plain, a list-packed and a two-image record; then text alone."""
    bench.images("a.png", "b.png")
    records = [
        new_sample("<image>", "one", image="a.png"),
        [new_sample("two", "three"), new_sample("four", "five", image="b.png")],
        new_sample("<image> and <image>", "six", image=["b.png", "a.png"]),
        new_sample("seven", "eight", "nine", "ten"),
    ]
    settings = type(bench.settings)(min_pixels=1024, max_pixels=65536, records_per_shard=3)
    return bench.preprocess(records, settings=settings)


def test_megatron_opens_the_text(shards):
    for number, documents in ((0, [0, 1, 3, 4]), (1, [0, 1])):
        shard = shards.shard(number)
        for kind, reader in (("tokens", shard.tokens), ("spans", shard.spans)):
            megatron = IndexedDataset(str(Path(shards.location) / f"{number:05d}.{kind}"))
            assert megatron.document_indices.tolist() == documents
            assert len(megatron) == len(reader.lengths) == documents[-1]
            for sample in range(len(megatron)):
                assert megatron[sample].dtype == np.int32
                assert megatron[sample].tolist() == reader[sample].tolist()


def test_megatron_opens_the_images(shards, bench):
    megatron = IndexedDataset(str(Path(shards.location) / "00000.pictures"))
    files = {name: (bench.path / "images" / name).read_bytes() for name in ("a.png", "b.png")}
    assert [megatron[number].tobytes() for number in range(4)] == [files[name + ".png"] for name in "abba"]
    assert megatron.document_indices.tolist() == [0, 1, 1, 2, 4]  # images of each sample
    assert shards.shard(0).grids.tolist() == [[2, 4], [4, 4], [4, 4], [2, 4]]


def test_samples_name_where_they_come_from(shards):
    first, second = shards.shard(0).samples, shards.shard(1).samples
    assert first["record"].tolist() == [0, 1, 1, 2] and second["record"].tolist() == [3]
    assert first["pictures"].tolist() == [1, 0, 1, 2]
    assert [shards.describe(sample)[1] for sample in range(len(shards))] == [0, 1, 1, 2, 3]
    for shard in (shards.shard(0), shards.shard(1)):
        for sample, trained in enumerate(shard.samples["trained"]):
            assert np.diff(shard.spans[sample].reshape(-1, 2)).sum() == trained


def test_image_tokens_of_samples_are_those_in_their_text(shards):
    for shard in (shards.shard(0), shards.shard(1)):
        context = [int((shard.tokens[n] == shards.ids.image_context).sum()) for n in range(len(shard.samples))]
        assert shard.image_tokens.tolist() == context


def test_manifest_has_size_and_checksum_of_every_file(shards):
    manifest = json.loads((Path(shards.location) / "manifest.json").read_text())
    files = {name: file for entry in manifest["shards"] for name, file in entry["files"].items()}
    assert {path.name for path in Path(shards.location).iterdir()} == {*files, "manifest.json", "rejects.jsonl"}
    for name, file in files.items():
        content = (Path(shards.location) / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_manifest_says_how_it_was_made(shards):
    assert shards.manifest["settings"]["max_pixels"] == 65536
    assert shards.manifest["tokenizer"]["ids"]["image_context"] == 896
    assert shards.manifest["counts"] == {
        "records_read": 4,
        "samples_read": 5,
        "samples_kept": 5,
        "samples_rejected": 0,
        "rejected_by_reason": {},
        "pictures": 4,
        "samples_with_images": 3,
        "empty_answers": 0,
        "ignored_keys": {},
        "foreign_placeholders": {},
    }


def read_all(location: Path) -> None:
    """Reads what a training run and its messages read."""
    shards = ShardSet(location)
    shards.fetch(range(len(shards)))
    for sample in range(len(shards)):
        shards.describe(sample)


@pytest.mark.parametrize(
    "kind",
    ["tokens.bin", "tokens.idx", "spans.bin", "spans.idx", "pictures.bin", "pictures.idx", "grids.npy", "samples.npy"],
)
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content + b"x", None])
def test_a_file_of_another_size_is_reported(shards, kind, damage):
    path = Path(shards.location) / f"00000.{kind}"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(DataError, match=f"00000.{kind} (is missing|has .* bytes, not {len(content)})"):
        read_all(Path(shards.location))


@pytest.mark.parametrize("kind", ["tokens", "spans", "pictures"])
@pytest.mark.parametrize("sequence", [0, 3])
@pytest.mark.parametrize("length", [-1, 1 << 30])
def test_a_wrong_index_is_found(shards, kind, sequence, length):
    """An index of the same size with a sequence outside of the data."""
    path = Path(shards.location) / f"00000.{kind}.idx"
    index = bytearray(path.read_bytes())
    struct.pack_into("<i", index, 34 + 4 * sequence, length)
    path.write_bytes(index)
    with pytest.raises(DataError, match=f"00000.{kind}.bin is damaged: .* does not fit"):
        read_all(Path(shards.location))


def test_an_array_of_another_shape_is_found(shards):
    path = Path(shards.location) / "00000.grids.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'shape': (4, 2)", b"'shape': (8, 1)"))
    with pytest.raises(DataError, match=r"00000.grids.npy is damaged: it is not an array of .*\(4, 2\)"):
        read_all(Path(shards.location))


def test_the_number_of_open_shards_is_limited(bench, new_sample, monkeypatch, samples_of):
    """A process may map 65,530 files: old maps are closed, and arrays that were read from them stay valid."""
    settings = type(bench.settings)(records_per_shard=1)
    shards = bench.preprocess([new_sample("w " * number, "x") for number in range(40)], settings=settings)
    monkeypatch.setattr("neo_megatron.data.shards.reader._most_opened", lambda: 4)
    fetched = shards.fetch(range(40))
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(Path(shards.location)) in line]
    assert [sample.tokens.tolist() for sample in fetched] == [
        tokens for tokens, _ in samples_of(ShardSet(shards.location))
    ]
    del fetched
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(Path(shards.location)) in line]
    assert 0 < len(maps) <= 4 * 8


def test_fetch_returns_the_contents_of_the_files(shards):
    order = [4, 0, 3, 3, 1]
    for sample, stored in zip(order, shards.fetch(order), strict=True):
        shard, local = shards.locate(sample)
        assert stored.tokens.tolist() == shard.tokens[local].tolist()
        assert stored.spans.reshape(-1).tolist() == shard.spans[local].tolist()
        numbers = list(shard.image_range(local))
        assert stored.grids.tolist() == shard.grids[numbers].tolist()
        assert [image.tobytes() for image in stored.images] == [shard.images[n].tobytes() for n in numbers]
        assert not stored.images or not stored.images[0].flags.owndata  # a view of the mapped file
    assert [stored.images for stored in shards.fetch([0, 3], images=False)] == [[], []]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "neo-packs", "version": 1}', '{"format": "neo-shards"}'])
def test_a_wrong_manifest_is_reported(shards, text):
    (Path(shards.location) / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json|holds packs, not shards"):
        ShardSet(Path(shards.location))


def test_an_unfinished_directory_is_not_a_data_set(shards):
    (Path(shards.location) / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds a data set without its manifest.json"):
        ShardSet(Path(shards.location))


def test_pickled_shards_have_names_but_not_maps(shards, samples_of):
    before = samples_of(shards)
    sent = pickle.dumps(shards)
    assert len(sent) < 3 * len(json.dumps(shards.manifest))
    assert samples_of(pickle.loads(sent)) == before


def test_the_reader_of_the_format_page_works(shards, monkeypatch):
    """``docs/shard_format.md`` ends with a reader, which reads the same samples as `ShardSet`."""
    page = (ROOT / "docs" / "shard_format.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace("[7]", "[2]")
    monkeypatch.chdir(Path(shards.location))
    names: dict = {}
    exec(code, names)
    assert names["tokens"].tolist() == shards.shard(0).tokens[2].tolist()


def test_a_data_set_keeps_no_parsed_shards(shards):
    assert "shards" not in shards.manifest and [entry.name for entry in shards.entries] == ["00000", "00001"]
