"""Bounds of tars that other processes find: those of the process itself, in the order of the files."""

import io
import os
import signal
import tarfile
from multiprocessing import active_children
from pathlib import Path

import pytest

from neo_megatron.data.prepare import bounds_ahead
from neo_megatron.data.prepare.annotation_slices import Place, Slice, slices
from neo_megatron.data.prepare.bounds_ahead import BoundsAhead
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError


def write_tar(path: Path, records: int, image: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(records):
            for extension, content in (("png", image), ("txt", f"Caption {number}.".encode())):
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def sources(bench, new_png) -> list[Source]:
    """Tars of several sizes, the third of which is cut off, with a file of another kind among them."""
    image = new_png(32, 32)
    tars = [write_tar(bench.path / f"{number}.tar", records, image) for number, records in enumerate((5, 1, 9, 2, 7))]
    os.truncate(tars[2], tars[2].stat().st_size // 2 + 700)
    files = [*tars[:4], bench.annotations([], "empty.json"), tars[4]]
    return [Source(name, str(file)) for name, file in zip("aaabcd", files, strict=True)]


@pytest.fixture
def one_process(monkeypatch) -> None:
    monkeypatch.setattr(bounds_ahead, "_WORKERS_EACH", 1)


def shown(pieces: list[Slice]) -> list[tuple]:
    return [(piece.place, piece.bounds.tolist(), piece.broken, piece.share, piece.texts) for piece in pieces]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [2, 100])
def test_slices_are_those_of_one_process(sources, one_process, size, workers):
    expected = list(slices(sources, size))
    ahead = BoundsAhead(sources, workers)
    try:
        found = list(slices(sources, size, bounds_of=ahead.of))
    finally:
        ahead.close()
    assert shown(found) == shown(expected) and not active_children()
    assert any(piece.broken for piece in found) and len(found) >= 5
    for piece in expected[::4]:  # as a run that was interrupted there
        ahead = BoundsAhead(sources, 1)
        try:
            rest = list(slices(sources, size, piece.place, ahead.of))
        finally:
            ahead.close()
        assert shown(rest) == shown(expected[piece.place.number :])


def test_shards_are_those_of_one_process(bench, sources, one_process, directory_bytes, monkeypatch):
    preprocess(sources, bench.tokenizer, bench.path / "alone", bench.settings)
    asked: list[str] = []
    original = bounds_ahead.WorkerPool.start
    monkeypatch.setattr(
        bounds_ahead.WorkerPool, "start", lambda pool, number, item: asked.append(item) or original(pool, number, item)
    )
    preprocess(sources, bench.tokenizer, bench.path / "ahead", bench.settings, workers=2)
    assert [item for item in asked if isinstance(item, str)] == [
        source.annotations for source in sources if source.annotations.endswith("tar")
    ]
    assert directory_bytes(bench.path / "ahead") == directory_bytes(bench.path / "alone")


def test_few_workers_single_tars_and_large_ones_need_no_help(sources, monkeypatch):
    assert BoundsAhead(sources, 3).of(0) is None
    ahead = BoundsAhead(sources, 8)
    assert ahead.of(3) is None and ahead.of(4) is None and ahead.of(5) is None
    monkeypatch.setattr(bounds_ahead, "_LARGEST", 1000)
    assert ahead.of(0) is None
    assert not active_children()


def test_a_process_that_dies_and_a_file_that_is_gone_are_reported(sources, one_process):
    for how in ("died", "gone"):
        ahead = BoundsAhead(sources, 1)
        try:
            bounds = ahead.of(0)
            os.unlink(sources[0].annotations)
            if how == "gone":
                with pytest.raises(FileNotFoundError):
                    next(bounds)
                continue
            os.mkfifo(sources[0].annotations)  # a process that opens it waits forever
            os.kill(active_children()[0].pid, signal.SIGKILL)
            with pytest.raises(DataError, match=r"a worker died \(by SIGKILL\) while it looked for .*0\.tar; run the"):
                next(bounds)
        finally:
            ahead.close()
        os.unlink(sources[0].annotations)
        write_tar(Path(sources[0].annotations), 5, b"")


def test_a_resumed_slice_within_a_file_is_found_here(sources, one_process):
    ahead = BoundsAhead(sources, 1)
    first = next(slices(sources, 2))
    assert first.next.offset and first.next.source == 0
    assert next(slices(sources, 2, first.next, ahead.of)).place == Place(1, 0, 1, 2, first.end, "0")
    assert not active_children()
