"""The same command completes packing after a kill, and an output has one writer at a time."""

import dataclasses
import os
from fractions import Fraction
from pathlib import Path

import pytest
from support.kills import in_child, kill_at_step

from neo_megatron.data.packs.index import FORMAT
from neo_megatron.data.packs.outputs import NewOutputs
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
MARK = f"{FORMAT}.partial"


@pytest.fixture
def pack(bench, new_sample, monkeypatch):
    """Packs 12 records, 4 of them held out, into `train` and `held` of a directory."""
    file = bench.annotations([new_sample(f"{number}?", "yes") for number in range(12)])
    shards = bench.path / "shards"
    settings = dataclasses.replace(bench.settings, records_per_shard=8)
    preprocess([Source("one", str(file), "")], bench.tokenizer, shards, settings)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a kill loses nothing that is written; only slow here

    def run(directory: Path) -> None:
        held_out = HeldOut(Fraction(1, 3), str(directory / "held"))
        write_packs([PackInput(str(shards))], directory / "train", 64, held_out=held_out)

    return run


def contents(directory: Path, directory_bytes) -> list[dict[str, bytes]]:
    return [directory_bytes(directory / side) for side in ("train", "held")]


def test_both_outputs_are_completed_after_a_kill_at_any_step(pack, tmp_path, directory_bytes):
    pack(tmp_path / "complete")
    complete = contents(tmp_path / "complete", directory_bytes)
    assert all(MARK not in side and "manifest.json" in side for side in complete)

    def until_killed(step: int) -> None:
        kill_at_step(step, before=bool(step % 2))
        pack(tmp_path / str(step))

    step, killed, again = 0, True, 0
    while killed:
        step += 1
        killed = os.WIFSIGNALED(in_child(lambda: until_killed(step)))  # noqa: B023 - called at once
        if any("manifest.json" not in side for side in contents(tmp_path / str(step), directory_bytes)):
            again += 1
            pack(tmp_path / str(step))
        elif any(MARK in side for side in contents(tmp_path / str(step), directory_bytes)):
            with pytest.raises(DataError, match="already holds a data set"):
                pack(tmp_path / str(step))
        found = contents(tmp_path / str(step), directory_bytes)
        assert [{name: side[name] for name in side if name != MARK} for side in found] == complete, step
    assert step > 10 and again > 8


def test_the_next_command_removes_a_marker_left_by_a_kill(pack, tmp_path, directory_bytes):
    """After a kill between removing the markers of two complete directories, the second is complete too."""
    pack(tmp_path)
    (tmp_path / "held" / MARK).touch()
    with pytest.raises(DataError, match="held already holds a data set"), NewOutputs([tmp_path / "held"], FORMAT):
        pass
    assert not (tmp_path / "held" / MARK).exists()


def test_an_output_has_one_writer(pack, tmp_path):
    with (
        NewOutputs([tmp_path / "held"], FORMAT),
        pytest.raises(DataError, match="another run is writing to .*held; wait until it ends"),
    ):
        pack(tmp_path)
    assert list((tmp_path / "train").iterdir()) == []


def test_other_files_are_not_removed(pack, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.tex").touch()
    with pytest.raises(DataError, match="held is not empty; choose another --output"):
        pack(tmp_path)
    assert [path.name for side in ("train", "held") for path in (tmp_path / side).iterdir()] == ["thesis.tex"]
