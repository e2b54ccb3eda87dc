"""The shards that a manifest lists are kept as it lists them, in little memory."""

import json
import tracemalloc

import pytest
from support.manifests import shard_entry

from neo_megatron.data.manifest_schema import expected_files
from neo_megatron.data.shards.entries import ShardEntries, ShardEntry


@pytest.mark.parametrize("version", [2, 3])
def test_entries_are_those_of_the_manifest(version):
    listed = [shard_entry(number, version) for number in (0, 3, 100_000)]  # gaps: slices without usable samples
    entries = ShardEntries(listed, version)
    assert len(entries) == 3 and entries.samples.tolist() == [entry["samples"] for entry in listed]
    for entry, wanted in zip(entries, listed, strict=True):
        sizes = {name: file["bytes"] for name, file in wanted["files"].items()}
        assert sizes.keys() == expected_files(wanted["name"], version)
        assert entry == ShardEntry(wanted["name"], wanted["samples"], wanted["pictures"], wanted.get("media", 0), sizes)


def test_they_take_a_tenth_of_the_memory_of_parsed_objects():
    text = json.dumps([shard_entry(number, 3) for number in range(1000)])
    tracemalloc.start()
    listed = json.loads(text)
    parsed = tracemalloc.get_traced_memory()[0]
    entries = ShardEntries(listed, 3)
    del listed
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(entries) == 1000 and kept < parsed / 10


def test_there_may_be_none():
    assert list(ShardEntries([], 3)) == []
