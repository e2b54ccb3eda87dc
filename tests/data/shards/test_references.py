"""Images that stay in their tars or files: training gets the same items, and a file that has changed is noticed."""

import base64
import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from neo_megatron.data.dataset import GlobalBatch, PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards import references
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.shards.references import BrokenReference, Reference, read_references
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError

STORES = ("encoded", "reference", "patches")


@pytest.fixture
def records(bench, new_sample) -> list[dict]:
    """Texts, and samples of one and of several images."""
    bench.images(*(f"{number}.png" for number in range(5)))
    found = [new_sample("<image> this", f"is {number}", image=f"{number}.png") for number in range(5)]
    found.append(new_sample("<image> and <image>", "both", image=["3.png", "1.png"]))
    return [*found, new_sample("no", "image")]


@pytest.fixture
def tar(bench, records) -> Source:
    """The same records in a tar: each JSON with its images."""
    path = bench.path / "a.tar"
    with tarfile.open(path, "w") as file:
        for number, record in enumerate(records):
            names = record.get("image", [])
            members = {}
            for place, name in enumerate([names] if isinstance(names, str) else names):
                members[f"{number:03d}.{place}.png"] = (bench.path / "images" / name).read_bytes()
            members[f"{number:03d}.json"] = json.dumps({"conversations": record["conversations"]}).encode()
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return Source("train", str(path))


@pytest.fixture
def write(bench, tar, records):
    """Shards of the records in a store, from loose files or from the tar."""

    def run(store: str, form: str = "files", output: str = "", **settings) -> ShardSet:
        chosen = dataclasses.replace(bench.settings, image_store=store, **settings)
        name = output or f"{store}-{form}"
        if form == "files":
            return bench.preprocess(records, name, chosen)
        preprocess([tar], bench.tokenizer, bench.path / name, chosen)
        return ShardSet(bench.path / name)

    return run


def contents(shards: ShardSet) -> list:
    samples = shards.fetch(range(len(shards)))
    return [(s.tokens.tolist(), s.grids.tolist(), [image.tobytes() for image in s.images]) for s in samples]


@pytest.mark.parametrize("form", ["files", "tar"])
def test_samples_are_those_of_the_encoded_store(bench, write, form):
    encoded, referred = write("encoded", form), write("reference", form)
    assert contents(encoded) == contents(referred) == contents(write("encoded", output="files"))
    assert not bench.rejects(f"reference-{form}") and not verify(referred.location).damage
    sizes = [Path(shards.location, "00000.pictures.bin").stat().st_size for shards in (encoded, referred)]
    assert sizes[1] < sizes[0] / 10
    for kind in ("tokens.bin", "spans.bin", "grids.npy", "samples.npy", "media.npy"):
        one, other = (Path(shards.location, f"00000.{kind}").read_bytes() for shards in (encoded, referred))
        assert one == other


@pytest.mark.parametrize("quality", [100, 50])
def test_packs_of_all_stores_together_are_those_of_the_encoded_one(bench, write, quality):
    """Also after recompression as JPEG, which is drawn by sample, and with items in any order."""
    mixed = [write(store) for store in (STORES[:2] if quality < 100 else STORES)]
    alone = [write("encoded", output=f"again-{number}") for number in range(len(mixed))]
    items = []
    for name, sets in (("mixed", mixed), ("alone", alone)):
        write_packs([PackInput(shards.location) for shards in sets], bench.path / name, 96)
        data = PackDataset(bench.path / name, 40, 7, global_batch=GlobalBatch(4, 2, 1), min_jpeg_quality=quality)
        items.append([data[number] for number in (3, 0, 39, *range(10, 20))])
    for one, other in zip(*items, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if torch.is_tensor(one[key]))


def test_a_rank_that_embeds_no_image_still_reads_them(bench, write):
    """It computes the loss, so it has to agree on which images are broken."""
    shards = write("reference", check="header")
    bench.pack(96, data="reference-files")
    dataset = PackDataset(bench.path / "packs", 4, 0, images="check")
    assert not dataset[0]["broken"] and len(dataset[0]["patches"]) == 0
    for file in (bench.path / "images").iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="has changed since the data set refers to it"):
        [dataset[number] for number in range(4)]
    assert len(shards.fetch(range(len(shards)), images=False)) == 7


def test_a_changed_file_is_noticed(bench, write, tar):
    shards = write("reference", "tar")
    path = Path(tar.annotations)
    good = path.read_bytes()
    place = good.index(b"\x89PNG", good.index(b"003.0.png")) + 60
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    with pytest.raises(DataError, match=r"a.tar has changed since the data set refers to it: the [\d,]+ bytes at"):
        shards.fetch(range(len(shards)))
    (damage,) = verify(shards.location).damage
    assert "a.tar has changed" in damage.sentence and "record 3" in damage.sentence
    shards.fetch([0, 1, 2])  # others are as they were
    path.write_bytes(good[:2000])
    with pytest.raises(DataError, match="has changed"):
        shards.fetch([4])
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar, which has images of the data set, cannot be read \(No such file"):
        shards.fetch([0])
    os.mkfifo(path)
    with pytest.raises(DataError, match="is not a regular file"):
        shards.fetch([0])


def test_what_has_no_place_in_a_file_is_rejected(bench, new_sample, new_png):
    uri = "data:image/png;base64," + base64.b64encode(new_png()).decode()
    settings = dataclasses.replace(bench.settings, image_store="reference")
    bench.preprocess([new_sample("<image>", "x", image=uri), new_sample()], settings=settings)
    (reject,) = bench.rejects()
    assert "has no bytes of its own in a file" in reject["reason"] and "--image-store encoded" in reject["reason"]


def test_neighbours_are_read_together(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(1 << 20)
    path = tmp_path / "data"
    path.write_bytes(data)
    places = [(700_000, 10), (0, 100), (100, 50), (50, 20), (60_000, 0), (900_000, 100_000), (0, 100)]
    wanted = [Reference.to(str(path), offset, data[offset : offset + length]) for offset, length in places]
    reads = []
    pread = os.pread
    monkeypatch.setattr(references.os, "pread", lambda *call: reads.append(call[1:]) or pread(*call))
    found = read_references(wanted)
    assert [image.tobytes() for image in found] == [data[offset : offset + length] for offset, length in places]
    assert reads == [(60_000, 0), (10, 700_000), (100_000, 900_000)]


@pytest.mark.parametrize(
    "stored",
    [
        *(b"", b"x" * 10, b"\0" * 20, b"\0" * 20 + b"relative", b"\0" * 20 + b"/a\0b", b"\xff" * 20 + b"/a"),
        *(b"\0" * 20 + b"/" + b"a" * 5000, (1 << 62).to_bytes(8, "little") * 2 + b"\0" * 4 + b"/a"),
    ],
)
def test_what_is_not_a_reference_is_damage(stored):
    with pytest.raises(BrokenReference):
        Reference.unpack(np.frombuffer(stored, np.uint8))


@pytest.mark.parametrize("path", ["/a/b c.tar", "/\udcff.png"])
def test_a_reference_comes_back(path):
    reference = Reference.to(path, 1 << 40, b"abc")
    assert Reference.unpack(reference.pack()) == reference
