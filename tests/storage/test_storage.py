"""Data sets in object storage: data equal those of local files, whatever the server does."""

import json
import multiprocessing
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from support.s3_proxy import Request

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.shards.reader import ShardSet, StoredSample
from neo_megatron.errors import DataError
from neo_megatron.storage.base import join
from neo_megatron.storage.open import open_directory


@pytest.fixture
def upload(proxy) -> Callable[..., str]:
    """Copies the directories of shards and packs in a folder to a new bucket; returns its URL."""
    host, port = proxy.server

    def copy(folder: Path, bucket: str) -> str:
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=str(path.relative_to(folder)), Body=path.read_bytes())
        return f"s3://{bucket}"

    return copy


@pytest.fixture
def local(bench, new_sample) -> ShardSet:
    """Three shards of four records with images of several sizes."""
    bench.images("a.png", "b.png", "c.png")
    records = []
    for number in range(12):
        images = ["a.png", "b.png", "c.png"][: number % 4]
        tags = " ".join(["<image>"] * len(images))
        records.append(new_sample(f"{tags} word " + "w " * number, "an answer", image=images or None))
        if not images:
            del records[-1]["image"]
    settings = type(bench.settings)(min_pixels=1024, max_pixels=65536, records_per_shard=4)
    return bench.preprocess(records, output="set/shards", settings=settings)


@pytest.fixture
def remote(local, bench, upload, request) -> str:
    """The shards of ``local`` in a bucket of the test's own."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())
    return upload(bench.path / "set", f"b-{name}"[:60].rstrip("-")) + "/shards"


def values(samples: list[StoredSample]) -> list[Any]:
    return [
        (
            sample.tokens.tolist(),
            sample.spans.tolist(),
            sample.grids.tolist(),
            [image.tobytes() for image in sample.images],
        )
        for sample in samples
    ]


ORDER = [7, 0, 11, 3, 3, 5, 1, 2, 10]


def test_the_same_samples_as_from_disk(local, remote):
    shards = ShardSet(remote)
    assert (len(shards), shards.fingerprint, shards.location) == (len(local), local.fingerprint, remote)
    assert values(shards.fetch(ORDER)) == values(local.fetch(ORDER))
    assert values(shards.fetch(ORDER, images=False)) == values(local.fetch(ORDER, images=False))
    assert [shards.describe(n)[1] for n in range(12)] == [local.describe(n)[1] for n in range(12)]
    assert shards.shard(0).image_tokens.tolist() == local.shard(0).image_tokens.tolist()
    shard, place = shards.locate(7)
    assert shard.tokens[place].tolist() == local.fetch([7])[0].tokens.tolist()


def test_neighbouring_ranges_share_a_request_and_files_are_fetched_once(remote, proxy):
    ShardSet(remote).fetch(range(12))
    assert len(proxy.parts("pictures.bin")) == len(proxy.parts("tokens.bin")) == 3
    for kind in ("manifest.json", "tokens.idx", "spans.bin", "grids.npy"):
        assert len(proxy.parts(kind)) == (1 if kind == "manifest.json" else 3)
    before = len(proxy.requests)
    ShardSet(remote).fetch([0])
    kinds = [path.rsplit("/", 1)[1] for _, path, _ in proxy.requests[before:]]
    assert sorted(kinds) == ["00000.tokens.bin", "manifest.json"]  # the latter to see whether it is still the same


def test_ranges_are_requested_at_the_same_time(local, remote, proxy, settings):
    """Six requests wait for each other; sent one after another, they would never be answered."""
    settings(NEO_STORAGE_TIMEOUT=10, NEO_STORAGE_RETRY_SECONDS=0.001)
    shards = ShardSet(remote)
    shards.fetch(ORDER)
    together = threading.Barrier(6)

    def wait_for_others(request: Request) -> None:
        together.wait(timeout=5)

    proxy.fault = wait_for_others
    assert values(shards.fetch([1, 5, 9])) == values(local.fetch([1, 5, 9]))


def cached_bytes(shards: ShardSet) -> int:
    """Bytes of the files that are cached on the local disk."""
    files = Path(shards.location).iterdir()
    return sum(path.stat().st_size for path in files if path.suffix in (".idx", ".npy", ".json"))


def test_the_cache_stays_within_its_limit(local, remote, settings, tmp_path):
    size = cached_bytes(local)
    settings(NEO_CACHE_GB=size * 0.7 / 1e9)
    shards = ShardSet(remote)
    expected = values(local.fetch(range(12)))
    first = shards.fetch([0])
    for _ in range(2):
        for sample in (0, 4, 8):
            assert values(ShardSet(remote).fetch([sample])) == expected[sample : sample + 1]
            files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "usage"]
            assert sum(path.stat().st_size for path in files) <= size * 0.7
    assert values(first) == expected[:1]  # its files may be gone by now
    settings(NEO_CACHE_GB=1000 / 1e9)
    with pytest.raises(DataError, match=r"manifest\.json has .* more than the .* of the cache .* raise NEO_CACHE_GB"):
        ShardSet(remote)


def fetch_all(shards: ShardSet, results) -> None:
    results.put([values(shards.fetch([sample])) for sample in (*range(12), *range(12))])


def test_processes_share_a_cache_that_is_too_small(local, remote, settings):
    """One may remove a file that another has mapped, but none reads an incomplete file."""
    size = cached_bytes(local)
    settings(NEO_CACHE_GB=size * 0.7 / 1e9)
    shards, context = ShardSet(remote), multiprocessing.get_context("fork")
    shards.fetch([0])  # the parent has threads and sockets, which a fork must not use
    results = context.Queue()
    processes = [context.Process(target=fetch_all, args=(shards, results)) for _ in range(3)]
    for process in processes:
        process.start()
    expected = [values(local.fetch([sample])) for sample in (*range(12), *range(12))]
    assert [results.get(timeout=60) == expected for _ in processes] == [True] * 3
    for process in processes:
        process.join()


def test_a_replaced_data_set_is_not_read_from_the_cache(bench, remote, proxy, upload, new_sample):
    ShardSet(remote).fetch([0])
    other = bench.preprocess([new_sample("something", "else")], output="other/shards")
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*proxy.server))
    bucket = remote.split("/")[2]
    for path in Path(other.location).iterdir():
        client.put_object(Bucket=bucket, Key=f"shards/{path.name}", Body=path.read_bytes())
    assert values(ShardSet(remote).fetch([0])) == values(other.fetch([0]))


FAULTS = {500: "answers 500", 503: r"answers 503 \(SlowDown\)", "stall": "[Tt]imed? ?out", "cut": "onnection|bytes"}


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_are_retried_until_a_server_recovers(local, remote, proxy, settings, fault):
    if fault == "stall":
        settings(NEO_STORAGE_TIMEOUT=1)
    seen: dict[Any, int] = {}

    def twice(request: Request) -> Any:
        key = request.path, request.headers.get("Range")
        seen[key] = seen.get(key, 0) + 1
        return fault if request.command == "GET" and seen[key] <= 2 else None

    proxy.fault = twice
    assert values(ShardSet(remote).fetch([7, 0])) == values(local.fetch([7, 0]))
    assert min(count for (_, part), count in seen.items() if part) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_does_not_recover_is_reported(remote, proxy, settings, fault):
    shards = ShardSet(remote)
    shards.fetch([0])
    settings(NEO_STORAGE_RETRY_SECONDS=0.3, NEO_STORAGE_TIMEOUT=0.5 if fault == "stall" else 20)
    proxy.fault = lambda request: fault
    with pytest.raises(DataError) as caught:
        shards.fetch([3])
    sentence = str(caught.value)
    assert sentence.startswith(f"{remote}/00000.") and "\n" not in sentence
    assert re.search(FAULTS[fault], sentence), sentence
    assert re.search(r"after \d+ attempts? in", sentence) and "run the same command again: it continues" in sentence


def test_an_unreachable_server_is_reported(settings):
    settings(AWS_ENDPOINT_URL="http://127.0.0.1:9", NEO_STORAGE_RETRY_SECONDS=0.2)
    with pytest.raises(DataError, match=r"s3://bucket/shards/manifest\.json could not be read: .*127\.0\.0\.1:9"):
        ShardSet("s3://bucket/shards")


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("kind", ["tokens.bin", "tokens.idx", "spans.bin", "pictures.bin", "grids.npy"])
def test_an_object_of_another_size_is_reported(local, remote, proxy, kind, change):
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*proxy.server))
    content = (Path(local.location) / f"00000.{kind}").read_bytes()
    content = content[:change] if change < 0 else content + b"x"
    client.put_object(Bucket=remote.split("/")[2], Key=f"shards/00000.{kind}", Body=content)
    if kind in ("tokens.bin", "pictures.bin") and change > 0:
        return  # parts of it are read, none of which is beyond the end
    with pytest.raises(DataError, match=f"00000.{kind} (has {len(content)} bytes|is shorter).* copy it again"):
        ShardSet(remote).fetch(range(4))


def test_missing_objects_buckets_and_data_sets_are_reported(remote, proxy):
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*proxy.server))
    client.delete_object(Bucket=remote.split("/")[2], Key="shards/00001.tokens.bin")
    with pytest.raises(DataError, match=r"00001\.tokens\.bin is missing; copy the data set again"):
        ShardSet(remote).fetch([5])
    with pytest.raises(DataError, match=f"{remote}/nothing does not hold shards: it has no manifest.json"):
        ShardSet(f"{remote}/nothing")
    with pytest.raises(DataError, match="s3://no-such-bucket does not exist; check its name"):
        ShardSet("s3://no-such-bucket/shards")


def test_missing_and_rejected_credentials_are_reported(remote, proxy, settings):
    proxy.fault = lambda request: 403
    with pytest.raises(DataError, match=r"may not be read .*they need s3:GetObject"):
        ShardSet(remote)
    settings(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(DataError, match="needs credentials and there are none; set AWS_ACCESS_KEY_ID"):
        ShardSet(remote)


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch, remote):
    monkeypatch.setitem(sys.modules, "multistorageclient.types", None)
    with pytest.raises(DataError, match=r"pip install 'multi-storage-client\[boto3\]>=1.3'"):
        ShardSet(remote)


def test_local_files_do_not_need_the_library(local):
    code = "import sys; from neo_megatron.data.shards.reader import ShardSet; ShardSet(sys.argv[1]).fetch([0]);"
    code += "print([name for name in ('multistorageclient', 'boto3', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, local.location], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["NEO_CACHE_GB", "NEO_STORAGE_TIMEOUT"])
def test_a_wrong_setting_is_reported(settings, name):
    settings(**{name: "much"})
    with pytest.raises(DataError, match=f"{name} must be a number above 0, not 'much'"):
        ShardSet("s3://bucket/shards")


def test_profiles_of_the_library_are_used(local, remote, settings, tmp_path, proxy):
    """Its configuration file, with a profile that the location names, or to which a bucket is mapped."""
    bucket = remote.split("/")[2]
    options = {"base_path": bucket, "endpoint_url": proxy.url, "region_name": "us-east-1"}
    config = {
        "profiles": {"mine": {"storage_provider": {"type": "s3", "options": options}}},
        "path_mapping": {"s3://elsewhere/": "msc://mine/"},
    }
    (tmp_path / "msc.json").write_text(json.dumps(config))
    settings(MSC_CONFIG=tmp_path / "msc.json", AWS_ENDPOINT_URL=None)
    for location in ("msc://mine/shards", "s3://elsewhere/shards"):
        assert values(ShardSet(location).fetch(ORDER)) == values(local.fetch(ORDER))
    with pytest.raises(DataError, match="msc://other cannot be opened: .*other"):
        ShardSet("msc://other/shards")


def test_files_larger_than_a_request_are_fetched_in_parts(remote, tmp_path, monkeypatch, upload):
    monkeypatch.setattr("neo_megatron.storage.object_storage._CHUNK", 1000)
    content = np.random.default_rng(0).bytes(12_345)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "large" / "units.npy").write_bytes(content)
    directory = open_directory(upload(tmp_path / "large", "large"))
    assert directory.local("units.npy").read_bytes() == directory.read("units.npy") == content
    assert directory.size("units.npy") == 12_345 and directory.size("nothing") is None
    assert directory.read_range("units.npy", 5000, 77).tobytes() == content[5000:5077]


def test_relative_paths_are_joined_to_locations():
    assert join("s3://bucket/data/packs", "../shards") == "s3://bucket/data/shards"
    assert join("s3://bucket/data/packs/", "s3://other/shards") == "s3://other/shards"
    assert join("/data/packs", "../shards") == "/data/packs/../shards"
    assert join("/data/packs", "s3://bucket/shards") == "s3://bucket/shards"
    with pytest.raises(DataError, match="leads out of the bucket"):
        join("s3://bucket/packs", "../../other")


def test_packs_through_a_data_loader(bench, local, upload):
    """A training run reads packs with worker processes, which get names and open what they need."""
    bench.pack(128, data="set/shards", output="set/packs")
    location = upload(bench.path / "set", "packs") + "/packs"
    here, there = PackDataset(str(bench.path / "set" / "packs"), 10, seed=3), PackDataset(location, 10, seed=3)
    there[0]
    loader = torch.utils.data.DataLoader(there, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for index, item in enumerate(loader):
        expected = here[index]
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[key], expected[key]) for key in item if isinstance(item[key], torch.Tensor))
    assert index == 9
