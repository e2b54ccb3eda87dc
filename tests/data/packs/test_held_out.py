"""The held-out split: no image or video file is on both sides, however records name it."""

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.manifest import write_manifest
from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError


class Splitter:
    """Preprocesses data sets, packs them with a held-out part, and finds the records of each side."""

    def __init__(self, bench) -> None:
        self.bench = bench
        self.count = 0

    def shards(self, records: list, root: Path, records_per_shard: int = 8192, workers: int = 1) -> Path:
        self.count += 1
        file = self.bench.annotations(records, f"{self.count}.jsonl")
        output = self.bench.path / f"shards{self.count}"
        settings = type(self.bench.settings)(1024, 65536, records_per_shard=records_per_shard)
        preprocess(
            [Source(f"s{self.count}", str(file), str(root))], self.bench.tokenizer, output, settings, "fail", workers
        )
        return output

    def split(self, inputs: list[Path], percent: int = 25, by: str = "path", length: int = 256):
        """(training, held-out): for each side (number of the input, record) of all samples; and the manifests."""
        self.count += 1
        outputs = [self.bench.path / f"{side}{self.count}" for side in ("train", "held")]
        held_out = HeldOut(Fraction(percent, 100), str(outputs[1]), by)
        manifests = write_packs([PackInput(str(path)) for path in inputs], outputs[0], length, held_out=held_out)
        sides = []
        for output in outputs:
            assert verify(output).damage == []
            index = PackIndex.open(output)
            samples = index.table.samples(np.arange(len(index.table.units))).tolist()
            assert len(set(samples)) == len(samples)
            files = {
                str(self.bench.path / f"{path.name.removeprefix('shards')}.jsonl"): n for n, path in enumerate(inputs)
            }
            sides.append({(files[file], record) for file, record in map(index.data.describe, samples)})
        assert not sides[0] & sides[1]
        return sides[0], sides[1], manifests


@pytest.fixture
def splitter(bench) -> Splitter:
    return Splitter(bench)


IMAGES = 120


@pytest.fixture
def images(bench, new_png) -> Path:
    """A directory of different images, each under several names, with links to it and within it."""
    root = bench.path / "images"
    (root / "a").mkdir(parents=True)
    for number in range(IMAGES):
        (root / f"{number}.png").write_bytes(new_png(32, 32, number))
        (root / f"link{number}.png").symlink_to(f"{number}.png")
    (root / "same").symlink_to(".")
    (bench.path / "other_root").symlink_to("images")
    return root


@pytest.mark.parametrize("by", ["path", "content"])
@pytest.mark.parametrize(
    "spelling",
    [
        "./{n}.png",
        ".//{n}.png",
        "a/../{n}.png",
        "a/./../{n}.png",
        "link{n}.png",
        "same/{n}.png",
        "{root}/{n}.png",
        "{root}/../other_root/{n}.png",
    ],
)
def test_all_spellings_of_a_file_are_on_the_same_side(splitter, images, new_sample, spelling, by):
    plain = [new_sample("<image>q", f"A{n}", image=f"{n}.png") for n in range(IMAGES)]
    other = [new_sample("<image>q", f"B{n}", image=spelling.format(n=n, root=images)) for n in range(IMAGES)]
    train, held, _ = splitter.split([splitter.shards(plain, images), splitter.shards(other, images)], by=by)
    for side in (train, held):
        assert {n for which, n in side if which == 0} == {n for which, n in side if which == 1}
    assert 10 <= len(held) // 2 <= 60 and len(train) + len(held) == 2 * IMAGES


def test_data_sets_with_different_roots_split_alike(splitter, images, bench, new_sample):
    """The same files below another root, without a root, and through a link to the root."""
    (images / "deep").mkdir()
    for number in range(IMAGES):
        (images / f"{number}.png").rename(images / "deep" / f"{number}.png")
    inputs = [
        splitter.shards([new_sample("<image>q", f"A{n}", image=path.format(n=n)) for n in range(IMAGES)], root)
        for path, root in (
            ("{n}.png", images / "deep"),
            ("deep/{n}.png", bench.path / "other_root"),
            (f"{images}/deep/{{n}}.png", ""),
            ("images/deep/{n}.png", ""),
        )
    ]
    train, held, _ = splitter.split(inputs)
    for side in (train, held):
        numbers = [{n for which, n in side if which == part} for part in range(4)]
        assert numbers[0] and all(other == numbers[0] for other in numbers)


def random_records(new_sample, seed: int, count: int = 120) -> list:
    """Records with no, one or several images, and list-packed ones."""
    draw = random.Random(seed)

    def sample(number: int):
        names = [f"{draw.randrange(IMAGES)}.png" for _ in range(draw.choice([0, 1, 1, 1, 1, 1, 2, 3]))]
        return new_sample("<image>" * len(names) + "q", f"answer {number} {draw.random()}", image=names)

    return [[sample(n), sample(n)] if draw.random() < 0.1 else sample(n) for n in range(count)]


def images_of(record) -> set[str]:
    return {
        os.path.basename(name)
        for sample in (record if isinstance(record, list) else [record])
        for name in sample["image"]
    }


def groups_of(records: list) -> list[set[int]]:
    """The reference: connected components, found one record after another."""
    groups: list[tuple[set[int], set[str]]] = []
    for number, record in enumerate(records):
        numbers, names = {number}, images_of(record)
        touching = [group for group in groups if group[1] & names]
        groups = [group for group in groups if not group[1] & names]
        groups.append((numbers.union(*(g[0] for g in touching)), names.union(*(g[1] for g in touching))))
    return [numbers for numbers, _ in groups]


@pytest.mark.parametrize("by", ["path", "content"])
@pytest.mark.parametrize("seed", range(3))
def test_records_linked_through_several_images_stay_together(splitter, images, new_sample, seed, by):
    records = [record for record in random_records(new_sample, seed, 80)]
    train, held, (manifest, _) = splitter.split([splitter.shards(records, images)], 30, by)
    train, held = ({record for _, record in side} for side in (train, held))
    groups = groups_of(records)
    assert max(map(len, groups)) > 3
    assert all(group <= train or group <= held for group in groups)
    assert not set().union(*(images_of(records[n]) for n in train)) & set().union(
        *(images_of(records[n]) for n in held)
    )
    assert train | held == set(range(len(records)))
    report = manifest["split"]
    too_large = [len(group) for group in groups if len(group) > 24]
    assert report["kept_in_training"] == sum(too_large) and report["records"] == len(records)
    several = [group for group in groups if any(len(images_of(records[n])) > 1 for n in group)]
    assert report["linked_records"] == sum(map(len, several))
    assert report["largest_group"] == max(map(len, several))


def test_a_chain_of_images_is_one_group(splitter, images, new_sample):
    """[a], [a, b], [b, c], ... and a list-packed record with the last: the longest path between two records."""
    chain = [new_sample("<image>q", "a", image=["0.png"])]
    chain += [new_sample("<image><image>q", f"{n}", image=[f"{n}.png", f"{n + 1}.png"]) for n in range(20)]
    chain += [[new_sample("text", "b", image=[]), new_sample("<image>q", "c", image=["20.png"])]]
    random.Random(0).shuffle(chain)
    alone = [new_sample("<image>q", f"x{n}", image=[f"{21 + n % 19}.png"]) for n in range(60)]
    records = chain + alone
    train, held, _ = splitter.split([splitter.shards(records, images, records_per_shard=5)], 40)
    sides = [{(0, n) in held for n in range(len(chain))}, {(0, n) in held for n in range(len(chain), len(records))}]
    assert len(sides[0]) == 1 and sides[1] == {True, False}


def test_the_split_depends_only_on_the_records(splitter, images, new_sample):
    """Not on their order, the shards, the workers, the order of data sets, or the length of packs."""
    records = random_records(new_sample, 7, 60)
    halves = records[:30], records[30:]
    found = set()
    for inputs, length in (
        ([splitter.shards(records, images)], 256),
        ([splitter.shards(records[::-1], images, records_per_shard=7, workers=2)], 256),
        ([splitter.shards(half, images, records_per_shard=11) for half in halves], 256),
        ([splitter.shards(half, images) for half in halves[::-1]], 512),
    ):
        written = [
            json.loads(line) for path in inputs for line in (splitter.bench.path / f"{path.name[6:]}.jsonl").open()
        ]
        starts = [0, sum(1 for _ in (splitter.bench.path / f"{inputs[0].name[6:]}.jsonl").open())]
        _, held, _ = splitter.split(inputs, 30, "content", length)
        found.add(frozenset(json.dumps(written[starts[which] + record]) for which, record in held))
    assert len(found) == 1 and len(found.pop()) > 5


def test_by_content_finds_copies_and_survives_a_move(splitter, images, bench, new_sample):
    """By path, copies are different files, and so are files that have moved."""
    records = [new_sample("<image>q", f"A{n}", image=[f"{n}.png"]) for n in range(IMAGES)]
    moved = bench.path / "moved"
    moved.mkdir()
    for number in range(IMAGES):
        shutil.copy(images / f"{number}.png", moved)
    first, second = splitter.shards(records, images), splitter.shards(records, moved)
    held = {by: splitter.split([first, second], 30, by)[1] for by in ("path", "content")}
    ones, others = ({n for which, n in held["content"] if which == part} for part in range(2))
    assert ones == others and ones
    assert {n for which, n in held["path"] if which == 0} != {n for which, n in held["path"] if which == 1}
    assert {n for _, n in splitter.split([first], 30, "content")[1]} == ones
    assert {n for _, n in splitter.split([second], 30, "content")[1]} == ones


def test_a_group_larger_than_the_held_out_part_stays_in_training(splitter, images, new_sample):
    """One image in 200 of 400 records, as in data sets with a placeholder image."""
    shared = [new_sample("<image>q", f"A{n}", image=["0.png"]) for n in range(200)]
    texts = [new_sample(f"text {n}", "b") for n in range(200)]
    train, held, (manifest, _) = splitter.split([splitter.shards(shared + texts, images)], 25)
    assert {(0, n) for n in range(200)} <= train
    assert manifest["split"]["kept_in_training"] == 200
    assert 80 <= len(held) <= 120  # 100 were asked for


def test_a_grown_data_set_moves_only_records_that_it_links(splitter, images, new_sample):
    records = [new_sample("<image>q", f"A{n}", image=[f"{n % 30}.png"]) for n in range(120)]
    more = [new_sample("<image>q", f"B{n}", image=[f"{30 + n}.png"]) for n in range(10)]
    link = [new_sample("<image><image>q", "link", image=["3.png", "5.png"])]
    before = splitter.split([splitter.shards(records, images)], 40)[1]
    grown = splitter.split([splitter.shards(records + more, images)], 40)[1]
    linked = splitter.split([splitter.shards(records + more + link, images)], 40)[1]
    assert before == {(which, n) for which, n in grown if n < len(records)}
    moved = {n % 30 for _, n in grown ^ linked if n < len(records)}
    assert moved <= {3, 5}


def test_videos_and_images_count_as_files(splitter, images, bench, new_sample):
    """An animated GIF may be listed as an image and as a video."""
    pytest.importorskip("av")
    from PIL import Image

    for number in range(20):
        frames = [Image.new("RGB", (64, 64), (12 * number, 200 * step, 0)) for step in range(2)]
        frames[0].save(images / f"{number}.gif", save_all=True, append_images=frames[1:], duration=500)
    records = [new_sample("<image>q", f"A{n}", image=f"{n}.gif") for n in range(20)]
    records += [new_sample("<video>q", f"B{n}", video=f"./{n}.gif") for n in range(20)]
    for by in ("path", "content"):
        _, held, _ = splitter.split([splitter.shards(records, images)], 50, by, 512)
        assert Counter(n % 20 for _, n in held) == {n % 20: 2 for _, n in held} and held


def as_version_2(directory: Path) -> None:
    """Converts a directory of shards to what the previous release wrote."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["version"] = 2
    for shard in manifest["shards"]:
        del shard["media"], shard["files"][f"{shard['name']}.media.npy"]
        (directory / f"{shard['name']}.media.npy").unlink()
    write_manifest(directory, manifest)


def test_shards_of_version_2_can_be_packed_but_not_split(splitter, images, new_sample):
    shards = splitter.shards([new_sample("<image>q", f"A{n}", image=f"{n}.png") for n in range(9)], images)
    as_version_2(shards)
    assert verify(shards).damage == []
    write_packs([PackInput(str(shards))], splitter.bench.path / "packs", 256)
    assert verify(splitter.bench.path / "packs").damage == []
    assert PackDataset(splitter.bench.path / "packs", 1, seed=0)[0]["samples"] > 0
    with pytest.raises(DataError, match="preprocess it again, or pack without --held-out"):
        splitter.split([shards])


def test_packs_of_version_2_can_be_verified(splitter, images, new_sample):
    """It held out records by the key that shards store for the text."""
    shards = splitter.shards([new_sample(f"q{n}", "b") for n in range(40)], images)
    _, held, _ = splitter.split([shards])
    as_version_2(shards)
    for side in ("train", "held"):
        directory = splitter.bench.path / f"{side}{splitter.count}"
        manifest = json.loads((directory / "manifest.json").read_text())
        del manifest["sha256"], manifest["split"]
        manifest["version"] = 2
        manifest["data"][0]["sha256"] = ShardSet(shards).fingerprint
        write_manifest(directory, manifest)
        assert verify(directory).damage == []


def test_the_tool_prints_which_records_stay_together(splitter, images, bench, new_sample, run_tool):
    linked = [new_sample("<image><image>q", f"{n}", image=["0.png", f"{n + 1}.png"]) for n in range(20)]
    texts = [new_sample(f"text {n}", "b") for n in range(60)]
    shards = splitter.shards(linked + texts, images)
    done = run_tool(
        *("pack_data.py", "--data", shards, "--output", bench.path / "p", "--seq-length", 256),
        *("--held-out", 10, bench.path / "h", "--held-out-by", "content"),
    )
    assert done.returncode == 0, done.stderr
    assert "held out by content: 20 of 80 records are linked" in done.stdout
    assert "20 records are in groups" in done.stdout and "kept in training" in done.stdout
    done = run_tool(
        *("pack_data.py", "--data", shards, "--output", bench.path / "q"), "--seq-length", 256, "--held-out-by", "path"
    )
    assert done.returncode == 2 and "--held-out-by goes with --held-out" in done.stderr


def test_components_of_large_graphs_equal_those_of_a_search():
    """Components of a random graph near the size at which one large component appears, and of a path."""
    from neo_megatron.data.packs.held_out import _connect

    draw = np.random.default_rng(0)
    n = 20_000
    names = draw.integers(0, 2**64, n, dtype=np.uint64)
    path = np.stack([np.arange(n - 1), np.arange(1, n)])
    for edges in (draw.integers(0, n, (2, 11_000)), path):
        a, b = names[edges[0]], names[edges[1]]
        apart = a != b
        a, b = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
        neighbours = defaultdict(set)
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            neighbours[x].add(y)
            neighbours[y].add(x)
        files, component = _connect(a, b)
        smallest = dict(zip(files.tolist(), files[component].tolist(), strict=True))
        seen: set[int] = set()
        for start in sorted(neighbours):
            if start not in seen:
                waiting = [start]
                while waiting:
                    file = waiting.pop()
                    if file not in seen:
                        seen.add(file)
                        assert smallest[file] == start
                        waiting += neighbours[file]
        assert seen == set(smallest)
