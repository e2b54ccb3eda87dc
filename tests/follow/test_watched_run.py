"""Facts of a run, from arguments in a checkpoint that may be anything."""

from argparse import Namespace
from pathlib import Path

import pytest

from neo_megatron.checkpoint.torch_dist import TRACKER
from neo_megatron.follow.watched_run import RunFacts, WatchedRun


def test_a_run_tells_its_trackers_and_its_end(trained):
    facts = WatchedRun(trained.saved).facts([2, 4, 6])
    assert facts.train_iters == 6 and facts.save == str(trained.saved)
    assert facts.tensorboard_dir == str(trained.events)
    assert facts.wandb_project == "" and facts.wandb_dir == str(trained.saved / "wandb")


def test_facts_are_of_the_newest_checkpoint_that_can_be_read(run):
    (run / "iter_0000006" / ".metadata").write_bytes(b"")
    watched = WatchedRun(run)
    assert watched.facts([2, 4, 6]) == watched.facts([4]) and watched.facts([6]) is None and watched.facts([]) is None


@pytest.mark.parametrize("arguments", [None, Namespace(), Namespace(train_iters="6", save=5, tensorboard_dir=["/"])])
def test_arguments_of_another_kind_are_none(arguments):
    assert RunFacts.of(arguments) == RunFacts(None, "", "", "", "", "", "wandb")


def test_a_directory_of_weights_and_biases_is_the_one_given():
    assert RunFacts.of(Namespace(save="runs", wandb_save_dir="elsewhere")).wandb_dir == "elsewhere"


def test_steps_of_a_run_that_does_not_exist_yet(tmp_path):
    assert WatchedRun(tmp_path / "nowhere").steps() == []


def test_a_checkpoint_counts_when_its_last_file_and_the_tracker_file_are_there(tmp_path: Path):
    run = WatchedRun(tmp_path)
    for step in (8, 10, 12):
        run.path_of(step).mkdir()
        (run.path_of(step) / "metadata.json").write_text("{}" if step != 8 else "")
    assert run.steps() == []
    (tmp_path / TRACKER).write_text("10")
    assert run.steps() == [10] and run.stamp(8) is None and run.stamp(11) is None
    (run.path_of(8) / "metadata.json").write_text("{}")
    assert run.steps() == [8, 10] and run.stamp(8)
