"""Shards that refer to images in object storage: training gets the same items, and a change is noticed."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch

from neo_megatron.data.dataset import GlobalBatch, PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.shards.references import BrokenReference, Reference, read_references
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError


@pytest.fixture
def bucket(proxy):
    host, port = proxy.server
    bucket = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").Bucket("images")
    bucket.create()
    bucket.objects.delete()
    return bucket


@pytest.fixture
def records(bench, new_sample) -> list[dict]:
    bench.images(*(f"{number}.png" for number in range(5)))
    found = [new_sample("<image> this", f"is {number}", image=f"{number}.png") for number in range(5)]
    return [*found, new_sample("<image> and <image>", "both", image=["3.png", "1.png"]), new_sample("no", "image")]


@pytest.fixture
def sources(bench, records, bucket) -> dict[str, Source]:
    """The records with loose images and in a tar, each local and in a bucket."""
    file = bench.annotations(records)
    images = bench.path / "images"
    with tarfile.open(bench.path / "a.tar", "w") as tar:
        for number, record in enumerate(records):
            names = record.get("image", [])
            members = {
                f"{number}.{place}.png": (images / name).read_bytes()
                for place, name in enumerate([names] if isinstance(names, str) else names)
            }
            members[f"{number}.json"] = json.dumps({"conversations": record["conversations"]}).encode()
            for name, data in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    for path in (file, bench.path / "a.tar", *images.iterdir()):
        bucket.put_object(Key=f"x/{path.name}", Body=path.read_bytes())
    return {
        "files": Source("files", str(file), str(images)),
        "tar": Source("tar", str(bench.path / "a.tar")),
        "remote files": Source("files", "s3://images/x/train.json", "s3://images/x"),
        "remote tar": Source("tar", "s3://images/x/a.tar"),
    }


@pytest.fixture
def shards(bench, sources):
    """Writes the shards of some sources, by store."""

    def write(store: str, *names: str) -> ShardSet:
        output = bench.path / f"{store} {' '.join(names)}"
        settings = replace(bench.settings, image_store=store)
        preprocess([replace(sources[name], name=name) for name in names], bench.tokenizer, output, settings)
        assert not (output / "rejects.jsonl").read_bytes()
        return ShardSet(output)

    return write


def contents(shards: ShardSet) -> list:
    return [
        (it.tokens.tolist(), it.grids.tolist(), [image.tobytes() for image in it.images])
        for it in shards.fetch(range(len(shards)))
    ]


@pytest.mark.parametrize("form", ["files", "tar"])
def test_samples_are_those_of_the_encoded_store(shards, form):
    referred = shards("reference", f"remote {form}")
    assert contents(referred) == contents(shards("encoded", form))
    assert not verify(referred.location).damage
    stored = (Path(referred.location) / "00000.pictures.bin").read_bytes()
    assert b"s3://images/x/" in stored and b"secret" not in stored


def test_local_and_remote_references_share_packs(shards, bench):
    """In this process and in those of a data loader, which are forked after the first request."""
    names = ["files", "remote files", "tar", "remote tar"]
    items = []
    for store in ("encoded", "reference"):
        output = bench.path / f"packs {store}"
        write_packs([PackInput(shards(store, *names).location)], output, 256)
        packs = PackDataset(output, 6, 7, global_batch=GlobalBatch(2, 1, 1))
        items.append([packs[number] for number in range(6)])
    loader = torch.utils.data.DataLoader(packs, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for encoded, referred, loaded in zip(*items, loader, strict=True):
        assert encoded.keys() == referred.keys() and len(encoded["patches"])
        for key in encoded:
            if torch.is_tensor(encoded[key]):
                assert torch.equal(encoded[key], referred[key]) and torch.equal(encoded[key], loaded[key]), key


def test_images_of_a_pack_are_requested_together(shards, proxy):
    referred = shards("reference", "remote tar")
    proxy.requests.clear()
    contents(referred)
    assert len(proxy.parts("a.tar")) == 1
    referred = shards("reference", "remote files")
    proxy.requests.clear()
    contents(referred)
    assert len(proxy.parts(".png")) == 5, "an image that two samples have is read once"


def test_files_of_the_same_name_are_told_apart(bucket):
    for directory in "ab":
        bucket.put_object(Key=f"{directory}/0.png", Body=directory.encode() * 10)
    references = [Reference.to(f"s3://images/{directory}/0.png", 0, directory.encode() * 10) for directory in "ba"]
    assert [it.tobytes() for it in read_references(references)] == [b"b" * 10, b"a" * 10]


@pytest.mark.parametrize("change", ["byte", "shorter", "missing"])
def test_an_object_that_has_changed_is_noticed(shards, bucket, change):
    referred = shards("reference", "remote tar")
    tar = bucket.Object("x/a.tar")
    data = tar.get()["Body"].read()
    place = data.index(b"\x89PNG") + 100
    if change == "missing":
        tar.delete()
    else:
        tar.put(Body=data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] if change == "byte" else data[:place])
    sentence = "s3://images/x/a.tar (has changed since|has 612 bytes|is shorter|is missing).*or preprocess again"
    with pytest.raises(DataError, match=sentence):
        referred.fetch([0])
    found = verify(referred.location).damage
    assert found and all("s3://images/x/a.tar" in it.sentence for it in found)
    assert len(found) == (1 if change == "byte" else 7), "each image that is lost, and no other"


def test_requests_are_repeated(shards, proxy):
    referred = shards("reference", "remote files")
    failures = iter([503, None, 500] + [None] * 100)
    proxy.fault = lambda request: next(failures)
    assert len(contents(referred)) == 7


@pytest.mark.parametrize(
    "path",
    [
        "s3://images",
        "s3://images/../a",
        "s3://key:secret@images/a",
        "s3://images/a?X=b",
        "s3://images//a",
        "s3:/a",
        "a",
    ],
)
def test_hostile_addresses_are_broken_references(path):
    stored = Reference("/x", 0, 3, 0).pack().tobytes()[:-2] + path.encode()
    with pytest.raises(BrokenReference, match="neither an absolute path nor an address"):
        Reference.unpack(np.frombuffer(stored, np.uint8))
