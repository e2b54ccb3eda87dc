"""The directory that a run saves into, after any end of the run before it."""

import json

import pytest

from neo_megatron.checkpoint.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path):
    """Three finished checkpoints, the newest one named."""
    run = RunDirectory(tmp_path / "run")
    for iteration in (20, 40, 60):
        save(run, iteration)
    run.name(60)
    return run


def save(run, iteration, finished=True):
    path = run.path_of(iteration)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"data")
    if finished:
        (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))


def names(paths):
    return [path.name for path in paths]


def test_the_named_checkpoint_is_tried_first_and_then_those_before_it(directory):
    assert names(directory.candidates()) == ["iter_0000060", "iter_0000040", "iter_0000020"]
    directory.name(40)  # a user goes back
    assert names(directory.candidates()) == ["iter_0000040", "iter_0000020"]


@pytest.mark.parametrize("content", ["", "6x", "61", "\xff\xfe", "-60", "60 40", "releas"])
def test_a_damaged_tracker_means_the_newest_finished_checkpoint(directory, content):
    save(directory, 80, finished=False)
    directory.tracker.write_bytes(content.encode("latin-1"))
    assert names(directory.candidates())[0] == "iter_0000060"
    directory.tracker.unlink()
    assert names(directory.candidates())[0] == "iter_0000060"


def test_an_empty_and_a_missing_directory_hold_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        run = RunDirectory(path)
        assert (run.named(), run.candidates(), run.iterations(), run.clear_after(0)) == (None, [], [], [])


def test_unfinished_saves_are_deleted_and_others_set_aside(directory):
    save(directory, 80, finished=False)
    (directory.root / "iter_0000010.deleting").mkdir()
    (directory.root / "iter_0000040.set-aside").mkdir()
    (directory.root / "iter_best").mkdir()
    sentences = directory.clear_after(20)
    left = sorted(path.name for path in directory.root.iterdir() if path.is_dir())
    aside = ["iter_0000040.set-aside", "iter_0000040.set-aside-", "iter_0000060.set-aside"]
    assert left == ["iter_0000020", *aside, "iter_best"]
    assert [sentence.split(" ")[0].rsplit("/")[-1] for sentence in sentences] == [
        "iter_0000080",
        "iter_0000060",
        "iter_0000040",
    ]
    assert directory.iterations() == [20]


def test_surplus_counts_neither_what_is_being_written_nor_what_was_set_aside(directory):
    save(directory, 80)  # finished, but the tracker does not name it yet
    save(directory, 100, finished=False)
    save(directory, 50, finished=False)
    assert directory.surplus(1) == [40, 20]
    assert directory.surplus(2) == [20]
    assert directory.surplus(3) == directory.surplus(9) == []
    directory.tracker.unlink()
    assert directory.surplus(1) == []


def test_a_deleted_checkpoint_is_gone(directory):
    directory.delete(20)
    assert directory.iterations() == [60, 40]
    assert not list(directory.root.glob("iter_0000020*"))
