"""The same records as files of each kind give the same shards, for any number of workers and after a kill."""

import dataclasses
import os
from fractions import Fraction

import numpy as np
import pytest
from support.containers import KINDS, write
from support.kills import in_child, kill_at_step

from neo_megatron.data.prepare.annotation_slices import Slice, read_slice, slices
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source

READERS = ("jsonl.gz", "json.zst", "parquet", "arrow file", "arrow stream", "tar")
# Files of shards without identities of files by their paths, which differ.
CONTENTS = ("tokens", "spans", "pictures", "grids")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, new_bench, new_sample):
    """23 records with no, one or two images, in slices of 4."""
    bench = new_bench(tmp_path_factory.mktemp("kinds"))
    bench.settings = dataclasses.replace(bench.settings, records_per_shard=4)
    bench.images(*(f"{number}.png" for number in range(5)))
    bench.records = []
    for number in range(23):
        images = [f"{(number + index) % 5}.png" for index in range(number % 3)]
        bench.records.append(new_sample("<image>" * len(images) + f"What {number}?", f"Bé {number}.", image=images))
    bench.preprocess(write("jsonl", bench.path / "reference", bench.records, bench.path / "images"), "reference")
    return bench


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name.split(".")[1] in CONTENTS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_shards_of_loose_files(bench, directory_bytes, kind):
    """With 3 workers too, where a kind has a reader of its own."""
    file = write(kind, bench.path / "train", bench.records, bench.path / "images")
    bench.preprocess(file, kind)
    expected = contents(bench.path / "reference")
    assert len(expected) == 6 * 7 and contents(bench.path / kind) == expected
    assert (bench.path / kind / "rejects.jsonl").read_bytes() == b""
    if kind in READERS:
        bench.preprocess(file, f"{kind} again", workers=3)
        assert directory_bytes(bench.path / f"{kind} again") == directory_bytes(bench.path / kind)


@pytest.mark.parametrize("kind", READERS)
def test_a_killed_run_is_continued_to_the_same_bytes(bench, directory_bytes, kind):
    file = write(kind, bench.path / "killed", bench.records, bench.path / "images")
    source = Source("killed", str(file), str(bench.path / "images"))
    preprocess([source], bench.tokenizer, bench.path / f"{kind} complete", bench.settings)

    def stop() -> None:
        kill_at_step(34, before=True)
        preprocess([source], bench.tokenizer, bench.path / f"{kind} killed", bench.settings)

    assert os.WIFSIGNALED(in_child(stop))
    done = list((bench.path / f"{kind} killed").glob("*.outcome.json"))
    assert 1 < len(done) < 6
    preprocess([source], bench.tokenizer, bench.path / f"{kind} killed", bench.settings)
    assert directory_bytes(bench.path / f"{kind} killed") == directory_bytes(bench.path / f"{kind} complete")


def read(pieces: list[Slice], source: Source) -> list[tuple[int, str]]:
    return [(number, repr(record)) for piece in pieces for number, record in read_slice(piece, source, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_slicing_can_start_at_any_slice(bench, kind):
    file = write(kind, bench.path / "places", bench.records, bench.path / "images")
    source = Source("places", str(file), str(bench.path / "images"))
    for size in (4, 7, 100):
        every = list(slices([source], size))
        assert sum(len(piece.bounds) for piece in every) == 23 and not every[-1].broken
        for number, piece in enumerate(every):
            rest = list(slices([source], size, piece.next))
            assert [other.place for other in rest] == [other.place for other in every[number + 1 :]]
            assert read(rest, source) == read(every[number + 1 :], source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", ["50", "250"])
def test_shares_draw_the_same_records_from_every_kind(bench, kind, percent):
    numbers = []
    for name in ("jsonl", kind):
        file = write(name, bench.path / "shares", bench.records, bench.path / "images")
        source = Source("shares", str(file), "", Fraction(percent) / 100)
        pieces = list(slices([source], 4))
        numbers.append([number for number, _ in (pair for piece in pieces for pair in read_slice(piece, source, 7))])
    assert numbers[0] == numbers[1] and abs(len(numbers[0]) - 23 * float(percent) / 100) <= 0.5


def test_files_of_a_data_set_give_the_shards_of_one_file(bench):
    """If they are cut where slices are."""
    images = bench.path / "images"
    for number, part in enumerate((bench.records[:8], bench.records[8:16], bench.records[16:])):
        write("tar", bench.path / f"part{number}", part, images)
    sources = [Source("parts", str(bench.path / f"part{number}.tar")) for number in range(3)]
    preprocess(sources, bench.tokenizer, bench.path / "parts", bench.settings)
    assert contents(bench.path / "parts") == contents(bench.path / "reference")
    assert [piece.place.part for piece in slices(sources, 4)] == [0, 1, 2, 3, 4, 5]


def test_files_of_a_data_set_share_one_draw(bench):
    """The total is exact over all files, and each file draws other records."""
    for number in range(4):
        write("jsonl", bench.path / f"draw{number}", bench.records, bench.path / "images")
    files = [str(bench.path / f"draw{number}.jsonl") for number in range(4)]
    sources = [Source("draw", file, share=Fraction(1, 2)) for file in files]
    pieces = list(slices([Source("before", files[0]), *sources, Source("after", files[0])], 100))
    assert [piece.place.part for piece in pieces] == [0, 0, 1, 2, 3, 0]
    drawn = [[number for number, _ in read_slice(piece, sources[0], 0)] for piece in pieces[1:5]]
    assert sum(map(len, drawn)) == 46 and len(set(map(tuple, drawn))) == 4


def test_a_broken_file_does_not_change_what_follows(bench):
    good = write("jsonl", bench.path / "good", bench.records, bench.path / "images")
    broken = write("json", bench.path / "broken", bench.records, bench.path / "images")
    broken.write_bytes(broken.read_bytes()[:-40])
    for name, part in (("a", 6), ("b", 0)):  # the parts of a data set are counted on, those of another begin at 0
        sources = [Source("a", str(broken)), Source(name, str(good))]
        every = list(slices(sources, 4))
        follower = next(piece for piece in every if piece.place.source == 1)
        assert follower.place.part == part
        for number, piece in enumerate(every):
            assert [it.place for it in slices(sources, 4, piece.next)] == [it.place for it in every[number + 1 :]]


def test_sizes_of_slices_are_about_those_of_the_files(bench):
    for kind in KINDS:
        file = write(kind, bench.path / "sizes", bench.records, bench.path / "images")
        source = Source("sizes", str(file), str(bench.path / "images"))
        size = sum(piece.bytes_to(piece.end) for piece in slices([source], 4))
        assert 0.3 < size / file.stat().st_size < 1.7, kind
        assert all(piece.bounds.dtype == np.int64 for piece in slices([source], 4))
