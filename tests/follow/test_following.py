"""`neo-megatron follow`: every checkpoint once, whatever is killed, deleted or damaged; the run stays as it is."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support.kills import in_child, kill_at_step
from support.paths import GOLDEN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neo_megatron.checkpoint.run_directory import RunDirectory
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TRACKER
from neo_megatron.cli import evaluate
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.errors import CheckpointError, ConfigError, DataError
from neo_megatron.follow import following
from neo_megatron.follow.output import FollowOutput, best_steps, score_row
from neo_megatron.inference.answer_run import AnswerRun
from neo_megatron.inference.batches import Worker

STEPS = [2, 4, 6]
SETS = ["seen", "read"]


def listing(directory: Path) -> dict[str, str]:
    """Path -> hash of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]


def steps_of(output: Path) -> list[int]:
    return [row["step"] for row in rows_of(output)]


def recorded(events: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every event; files of one second are read in the order of process ids."""
    reader = EventAccumulator(str(events / "scores"), size_guidance={"scalars": 0}).Reload()
    tags = reader.Tags()["scalars"]
    return {tag: sorted((event.step, event.value) for event in reader.Scalars(tag)) for tag in tags}


def expected_events(output: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    for row in rows_of(output):
        for key, label in (("exact_match", "exact match"), ("anls", "ANLS")):
            found.setdefault(f"scores/{label}", []).append((row["step"], pytest.approx(row[key])))
            for name in SETS:
                point = row["step"], pytest.approx(row["data_sets"][name][key])
                found.setdefault(f"scores/{label} by data set/{name}", []).append(point)
    return found


@pytest.fixture(scope="module")
def source(trained, tmp_path_factory) -> Path:
    """A copy of the run at a place of its own, because pages name it."""
    return shutil.copytree(trained.saved, tmp_path_factory.mktemp("source") / "run")


@pytest.fixture(scope="module")
def followed(source, follow, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "out"
    follow(source, output)
    return output


def test_every_checkpoint_is_evaluated_as_the_other_commands_do(source, followed, trained, tmp_path, monkeypatch):
    assert steps_of(followed) == STEPS
    export = tmp_path / "export"
    convert_megatron_to_hf(source / "iter_0000004", export, load_tokenizer(GOLDEN / "tokenizer"))
    flags = ["--registry", trained.registry, "--datasets", *SETS, "--model", export, "--output", tmp_path / "out"]
    words = ["evaluate.py", *map(str, flags), "--max-new-tokens", "3", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    for name in ("answers.jsonl", "scores.json", "rejects.jsonl"):
        assert (followed / "evaluations" / "step-4" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["data_sets"]
    row = rows_of(followed)[1]
    assert row["data_sets"] == scores
    assert row["anls"] == pytest.approx(sum(scores[name]["anls"] for name in SETS) / 2)


def test_the_newest_and_the_best_exports_are_kept(source, followed, follow, tmp_path):
    kept = {f"step-{step}" for step in (*best_steps(rows_of(followed), 1), STEPS[-1])}
    assert {path.name for path in (followed / "exports").iterdir()} == kept
    follow(source, tmp_path / "all", "--keep-best", "3")
    assert {path.name for path in (tmp_path / "all" / "exports").iterdir()} == {f"step-{step}" for step in STEPS}
    follow(source, tmp_path / "all", "--keep-best", "0")
    assert [path.name for path in (tmp_path / "all" / "exports").iterdir()] == [f"step-{STEPS[-1]}"]


def test_only_the_scores_in_the_trackers_are_new(trained, run, follow, tmp_path):
    """The run stays byte for byte; the same command again writes no event a second time."""
    before, logged = listing(run), listing(trained.events)
    follow(run, tmp_path / "out")
    assert listing(run) == before
    after = listing(trained.events)
    assert logged.items() <= after.items()
    assert all(name.startswith("scores/") for name in after.keys() - logged.keys())
    assert recorded(trained.events) == expected_events(tmp_path / "out")
    files = listing(tmp_path / "out")
    follow(run, tmp_path / "out")
    assert listing(tmp_path / "out") == files and listing(trained.events) == after


def check_kills(trained, source, followed, follow, output: Path, first: int, before: bool) -> None:
    """Kills each start at one of its renames or removals until one ends by itself.

    Args:
        first: start n is killed at step ``first + n % 5``; 12 renames and removals may be those of work done again.
    """
    shutil.rmtree(trained.events / "scores", ignore_errors=True)
    complete = listing(followed / "exports" / f"step-{STEPS[-1]}").keys()
    for starts in range(100):

        def start(step: int) -> None:
            kill_at_step(step, before)
            follow(source, output)

        if (status := in_child(partial(start, first + starts % 5))) == 0:
            break
        assert status == signal.SIGKILL, "an error of a start after a kill"
        for export in (output / "exports").glob("step-*"):
            assert export.suffix or listing(export).keys() == complete
    assert starts > 3 and status == 0, "killed several times"
    assert listing(output) == listing(followed)
    assert recorded(trained.events) == expected_events(output)


def test_a_kill_at_any_stage_loses_nothing(trained, source, followed, follow, tmp_path):
    check_kills(trained, source, followed, follow, tmp_path / "out", 13, True)


def test_a_start_that_is_killed_at_its_first_file_can_be_repeated(run, follow, tmp_path):
    (run / TRACKER).write_text("0")
    for step, before in ((1, True), (1, False)):
        output = tmp_path / f"out-{before}"

        def start(step: int, before: bool, output: Path) -> None:
            kill_at_step(step, before)
            follow(run, output)

        assert in_child(partial(start, step, before, output)) == signal.SIGKILL
        follow(run, output)
        assert sorted(os.listdir(output)) == ["attention", "evaluations", "exports", "follow.json"]


@pytest.mark.thorough
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("first", range(1, 100, 10))
def test_a_kill_at_every_stage_loses_nothing(trained, source, followed, follow, tmp_path, first, before):
    """One kill, at each of all renames and removals: with three checkpoints there are fewer than a hundred."""
    for step in range(first, first + 10):
        shutil.rmtree(trained.events / "scores", ignore_errors=True)
        output = tmp_path / str(step)

        def start(step: int, output: Path) -> None:
            kill_at_step(step, before)
            follow(source, output)

        status = in_child(partial(start, step, output))
        assert status in (0, signal.SIGKILL) and (status == 0 or step < 100)
        follow(source, output)
        assert listing(output) == listing(followed)
        assert recorded(trained.events) == expected_events(output)


def test_a_kill_between_a_tracker_and_all_that_follows(trained, source, followed, follow, tmp_path):
    shutil.rmtree(trained.events / "scores", ignore_errors=True)

    def start() -> None:
        record = following.record

        def killed(*arguments):
            record(*arguments)
            os.kill(os.getpid(), 9)

        following.record = killed
        follow(source, tmp_path / "out")

    assert in_child(start) == 9
    assert recorded(trained.events)["scores/ANLS"][0][0] == 2 and not (tmp_path / "out" / "page.html").exists()
    follow(source, tmp_path / "out")
    assert listing(tmp_path / "out") == listing(followed)
    assert recorded(trained.events) == expected_events(followed)


def test_an_evaluation_is_continued(source, follow, tmp_path, monkeypatch):
    """Its answers are not asked again, its checkpoint is not exported again."""

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerRun, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            follow(source, tmp_path / "out")
    convert, answer, worked = following.convert_megatron_to_hf, Worker.__call__, []

    def noted(path, *arguments):
        worked.append(path.name)
        convert(path, *arguments)

    def answered(worker, *arguments):
        worked.append(worker._task.model.name)
        return answer(worker, *arguments)

    monkeypatch.setattr(following, "convert_megatron_to_hf", noted)
    monkeypatch.setattr(Worker, "__call__", answered)
    follow(source, tmp_path / "out")
    assert worked == ["iter_0000004", "step-4", "iter_0000006", "step-6"] and steps_of(tmp_path / "out") == STEPS


def test_an_export_is_evaluated_though_its_checkpoint_is_gone(run, follow, tmp_path):
    """The run deleted it while this command was stopped."""

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            follow(run, tmp_path / "out")
    RunDirectory(run).delete(2)
    follow(run, tmp_path / "out")
    assert steps_of(tmp_path / "out") == STEPS


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_skipped(run, follow, tmp_path, monkeypatch, capsys):
    """As --save-total-limit does: renamed, then removed. One that went before is not there at all."""
    RunDirectory(run).delete(2)
    convert = following.convert_megatron_to_hf

    def deleting(path, *arguments):
        if path.name == "iter_0000004":
            RunDirectory(run).delete(4)
        convert(path, *arguments)

    monkeypatch.setattr(following, "convert_megatron_to_hf", deleting)
    follow(run, tmp_path / "out")
    assert steps_of(tmp_path / "out") == [6] and [p.name for p in (tmp_path / "out/exports").iterdir()] == ["step-6"]
    printed = capsys.readouterr().out
    assert "step 4: its checkpoint was deleted while it was read; skipped" in printed
    assert "checkpoints evaluated: 1; skipped: 1 deleted while they were read, 0 damaged" in printed


def test_a_checkpoint_that_is_deleted_before_its_weights_are_read(run, follow, tmp_path, monkeypatch, capsys):
    opened = following.open_megatron

    def deleting(path):
        RunDirectory(run).delete(int(path.name.removeprefix("iter_")))
        return opened(path)

    monkeypatch.setattr(following, "open_megatron", deleting)
    follow(run, tmp_path / "out")
    assert "checkpoints evaluated: 0; skipped: 3 deleted while they were read, 0 damaged" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_skipped_until_it_is_another(trained, run, follow, tmp_path, capsys):
    part = run / "iter_0000004" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-1000])
    follow(run, tmp_path / "out")
    assert steps_of(tmp_path / "out") == [2, 6]
    printed = capsys.readouterr().out
    assert f"step 4: {part}: has" in printed and "0 deleted while they were read, 1 damaged" in printed
    shutil.copy(trained.saved / "iter_0000004" / "__0_0.distcp", part)
    follow(run, tmp_path / "out")
    assert steps_of(tmp_path / "out") == STEPS


def test_unfinished_checkpoints_and_other_files_are_left_alone(run, follow, tmp_path, capsys):
    (run / TRACKER).write_text("4")
    (run / "iter_0000002" / "metadata.json").write_text("")  # was not finished
    (run / "iter_0000003").mkdir()
    (run / "iter_0000001").write_text("a file")
    (run / "iter_9999999999999999999999999").mkdir()
    before = listing(run)
    follow(run, tmp_path / "out")
    assert steps_of(tmp_path / "out") == [4], "6 is newer than the tracker file says"
    assert listing(run) == before
    for named in ("", "release", "no number"):
        (run / TRACKER).write_text(named)
        follow(run, tmp_path / f"none-{len(named)}")
        assert "checkpoints evaluated: 0;" in capsys.readouterr().out
    (run / TRACKER).unlink()
    os.mkfifo(run / TRACKER)
    with pytest.raises(DataError, match=f"{TRACKER}: a FIFO, not a file"):
        follow(run, tmp_path / "fifo")


def test_it_follows_until_the_last_step(trained, tmp_path, follow, monkeypatch, capsys):
    """The run saves while it is followed; RUN need not exist yet."""
    run, looks = tmp_path / "run", []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            assert "run has no complete checkpoint yet" in capsys.readouterr().out
            shutil.copytree(trained.saved, run)
            (run / TRACKER).write_text("2")
        elif len(looks) == 2:
            (run / TRACKER).write_text("6")
        else:
            raise AssertionError("it should have ended")

    monkeypatch.setattr(time, "sleep", sleep)
    follow(run, tmp_path / "out", "--poll", "7.5", once=False)
    assert looks == [7.5, 7.5] and steps_of(tmp_path / "out") == STEPS


def test_one_process_writes_to_an_output(run, follow, tmp_path):
    with FollowOutput(tmp_path / "out"), pytest.raises(DataError, match="another run is writing to .*out"):
        follow(run, tmp_path / "out")


def test_an_output_that_is_a_link_is_followed(run, follow, tmp_path):
    (run / TRACKER).write_text("0")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    follow(run, tmp_path / "out")
    assert (tmp_path / "elsewhere" / "follow.json").exists() and (tmp_path / "out").is_symlink()


def test_what_is_in_the_way(run, follow, followed, source, tmp_path):
    with pytest.raises(ConfigError, match="is in the directory of the run, which is only read"):
        follow(run, run / "followed")
    with pytest.raises(ConfigError, match="nowhere does not exist: give the --save directory"):
        follow(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="is one iteration of a Megatron checkpoint, not the directory of a run"):
        follow(run / "iter_0000002", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match="mine is not empty; choose another --output"):
        follow(run, tmp_path / "mine")
    assert sorted(os.listdir(tmp_path / "mine")) == ["thesis.tex"] and not (tmp_path / "out").exists()


def test_scores_of_other_settings_are_not_mixed(run, follow, tmp_path):
    (run / TRACKER).write_text("2")
    follow(run, tmp_path / "out")
    (run / TRACKER).write_text("4")
    with pytest.raises(DataError, match="has evaluations with another --max-new-tokens; repeat their command"):
        follow(run, tmp_path / "out", "--max-new-tokens", "2")
    follow(run, tmp_path / "out", "--batch-size", "1")
    assert steps_of(tmp_path / "out") == [2, 4]


def test_another_tokenizer_is_an_error_of_the_command(run, follow, tmp_path, monkeypatch):
    def refuse(tokenizer, sizes):
        raise CheckpointError("has other ids")

    monkeypatch.setattr(following, "check_tokenizer", refuse)
    with pytest.raises(CheckpointError, match="has other ids"):
        follow(run, tmp_path / "out")


def test_a_step_that_was_saved_again_is_named(run, follow, tmp_path, capsys):
    """A run that goes back to an older checkpoint takes the later steps again."""
    follow(run, tmp_path / "out")
    os.utime(run / "iter_0000004" / "metadata.json", ns=(1, 1))
    capsys.readouterr()
    follow(run, tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("the run has saved it again since") == 1 and "step 4: the run has saved it again" in printed


def scores(questions: int, match: float, anls: float) -> dict:
    return {"questions": questions, "exact_match": match, "anls": anls, "cut": 0}


def test_data_sets_count_the_same():
    summary = {"exact_match": 0.9, "data_sets": {"a": scores(900, 1.0, 1.0), "b": scores(100, 0.0, 0.5)}}
    row = score_row(5, summary)
    assert (row["step"], row["exact_match"], row["anls"]) == (5, 0.5, 0.75)
    summary["data_sets"]["of rejects only"] = scores(0, 0.0, 0.0)
    assert score_row(5, summary)["exact_match"] == 0.5
    rows = [{"step": step, "exact_match": match} for step, match in ((1, 0.5), (2, 0.7), (3, 0.5), (4, 0.1))]
    assert best_steps(rows, 3) == [2, 3, 1] and best_steps(rows, 0) == []
