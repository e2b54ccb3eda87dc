"""The same command continues a run that was killed at any point, with the same bytes."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.hostile_directories import changed_values
from support.kills import in_child, kill_at_step
from support.paths import TOOLS

from neo_megatron import atomic_files
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.prepare import executors
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.resume import PLAN, Run
from neo_megatron.errors import DataError

TOOL = TOOLS / "preprocess_data.py"

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def small(bench, new_sample, monkeypatch):
    """Two data sets, an array and lines: 12 records in slices of 3, some rejected, one slice with only rejects."""
    bench.images("a.png", "b.png")
    good = new_sample("<image>\nWhat?", "An image.", image="a.png")
    records = [good, new_sample(), {}, *[{}] * 3, [good, {}, new_sample("a", "b")], new_sample("c", "d")]
    array = bench.annotations(records, "array.json")
    lines = bench.annotations([new_sample("<image>", "two", image="b.png"), {}, good, new_sample()], "lines.jsonl")
    bench.sources = [Source(path.stem, str(path), str(bench.path / "images")) for path in (array, lines)]
    bench.settings = dataclasses.replace(bench.settings, records_per_shard=3)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a fork has none of its threads
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a kill loses nothing that is written; only slow here
    return bench


def run(bench, output: str, **changes) -> None:
    settings = dataclasses.replace(bench.settings, **changes.pop("settings", {}))
    preprocess(bench.sources, bench.tokenizer, bench.path / output, settings, **changes)


def test_a_run_killed_at_any_step_is_continued(small, directory_bytes):
    """At every rename and every removal, including those at the end of the run."""
    del small.sources[0]
    run(small, "complete")
    complete = directory_bytes(small.path / "complete")
    assert len([name for name in complete if name.endswith("tokens.bin")]) == 2

    def until_killed(step: int) -> None:
        kill_at_step(step, before=bool(step % 2))
        run(small, "killed")

    step, killed = 0, True
    while killed:
        step += 1
        killed = os.WIFSIGNALED(in_child(lambda: until_killed(step)))  # noqa: B023 - called at once
        if killed and not (small.path / "killed" / "manifest.json").exists() or (small.path / "killed" / PLAN).exists():
            run(small, "killed")
        assert directory_bytes(small.path / "killed") == complete, step
        shutil.rmtree(small.path / "killed")
    assert step > 20


def test_a_run_killed_repeatedly_makes_progress(small, directory_bytes):
    """No run has time for more than two slices, and finished slices are not repeated."""
    run(small, "complete")
    runs = 0
    while True:
        runs += 1

        def some_steps() -> None:
            kill_at_step(22, before=False)
            run(small, "killed")

        if not os.WIFSIGNALED(in_child(some_steps)):
            break
        assert runs < 10
    assert runs > 2
    assert directory_bytes(small.path / "killed") == directory_bytes(small.path / "complete")


def command(bench, output: str, workers: int, *more: str) -> list[str]:
    arguments = ["--tokenizer", bench.tokenizer, "--output", bench.path / output, "--workers", workers]
    arguments += ["--input", bench.file, "--image-root", bench.path / "images", "--records-per-shard", 50]
    return [sys.executable, str(TOOL), *map(str, arguments), "--min-pixels", "1024", *more]


@pytest.fixture
def large(bench, new_sample, new_png):
    """600 records of half a millisecond each, which is enough time for a kill in the middle."""
    bench.images("a.png")
    (bench.path / "images" / "a.png").write_bytes(new_png(300, 300))
    good = new_sample("<image>\nWhat?", "An image.", image="a.png")
    bench.file = bench.annotations([good, new_sample(), [good, {}]] * 200, "large.json")
    return bench


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_with_all_its_processes_is_continued(large, directory_bytes, workers):
    source = Source("large", str(large.file), str(large.path / "images"))
    settings = dataclasses.replace(large.settings, records_per_shard=50, max_pixels=4194304)
    preprocess([source], large.tokenizer, large.path / "complete", settings)
    started = subprocess.Popen(command(large, "killed", workers), stderr=subprocess.DEVNULL, start_new_session=True)
    while not (large.path / "killed" / "00003.tokens.bin").exists():
        assert started.poll() is None
        time.sleep(0.001)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    left = {path.name for path in (large.path / "killed").iterdir()}
    assert PLAN in left and "manifest.json" not in left
    preprocess([source], large.tokenizer, large.path / "killed", settings, workers=workers)
    assert directory_bytes(large.path / "killed") == directory_bytes(large.path / "complete")


def unfinished(bench, output: str = "killed") -> None:
    """A run that was killed after two slices."""

    def stop() -> None:
        original = executors.SliceWorker.run

        def once(worker, piece):
            if piece.place.number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(worker, piece)

        executors.SliceWorker.run = once
        run(bench, output)

    assert os.WIFSIGNALED(in_child(stop))
    assert (bench.path / output / "00001.outcome.json").exists()


def test_finished_slices_are_kept(small, monkeypatch, directory_bytes):
    run(small, "complete")
    unfinished(small)
    done = []
    original = executors.SliceWorker.run
    monkeypatch.setattr(
        executors.SliceWorker, "run", lambda self, piece: done.append(piece.place.number) or original(self, piece)
    )
    (small.path / "killed" / "00000.spans.idx").unlink()  # somebody has tidied up
    (small.path / "killed" / "00001.grids.npy.1234.partial").touch()
    (small.path / "killed" / "00005.grids.npy").touch()  # of a slice whose images were there at that time
    run(small, "killed")
    assert done == [0, 2, 3, 4]
    assert directory_bytes(small.path / "killed") == directory_bytes(small.path / "complete")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda bench: {"settings": {"min_pixels": 2048}}, "with --min-pixels 1024, not 2048"),
        (lambda bench: {"settings": {"check": "header"}}, "with --check decode, not header"),
        (lambda bench: bench.sources.reverse() or {}, "with another --input"),
        (lambda bench: bench.sources.pop() and {}, "with another --input"),
        (lambda bench: more_tokens(bench), "with another --tokenizer"),
        (
            lambda bench: Path(bench.sources[1].annotations).write_text("{}") and {},
            r"lines\.jsonl, which has changed since",
        ),
        (lambda bench: os.utime(bench.sources[0].annotations) or {}, r"array\.json, which has changed since"),
    ],
)
def test_a_different_command_is_rejected(small, directory_bytes, change, sentence):
    unfinished(small)
    before = directory_bytes(small.path / "killed")
    with pytest.raises(DataError, match=f"unfinished run .*{sentence}.*; repeat its command .*, or remove the direc"):
        run(small, "killed", **change(small))
    assert directory_bytes(small.path / "killed") == before


def more_tokens(bench) -> dict:
    tokenizer = load_tokenizer(bench.tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(bench.path / "tokenizer")
    bench.tokenizer = bench.path / "tokenizer"
    return {}


def test_a_failed_run_continues_without_the_bad_records(small, directory_bytes):
    run(small, "complete")
    with pytest.raises(DataError, match="record 2"):
        run(small, "failed", on_error="fail")
    run(small, "failed")
    assert directory_bytes(small.path / "failed") == directory_bytes(small.path / "complete")


def test_a_run_continued_with_on_error_fail_stops_at_skipped_samples(small):
    unfinished(small)
    with pytest.raises(DataError, match=r"array\.json, record 2:"):
        run(small, "killed", on_error="fail")


@pytest.mark.parametrize("name", [PLAN, "00000.outcome.json", "00001.outcome.json"])
def test_a_changed_state_of_an_unfinished_run_is_reported_with_its_file(small, name):
    """Or the run continues, as a number may be wrong without being impossible."""
    unfinished(small)
    state = (small.path / "killed" / name).read_bytes()
    texts = {
        "no JSON": b"{\n",
        "deep": b"[" * 100_000 + b"\n",
        "a list": b"[]\n",
        "no UTF-8": b'"\xff"\n',
        "empty": b"",
    }
    changes = [(label, json.dumps(changed).encode() + b"\n") for label, changed in changed_values(json.loads(state))]
    assert len(changes) > 200
    failed = []
    for number, (label, text) in enumerate([*texts.items(), *changes[:: 1 + len(changes) // 150]]):
        output = small.path / f"changed{number}"
        shutil.copytree(small.path / "killed", output)
        (output / name).write_bytes(text)
        try:
            run(small, output.name)
        except DataError as error:
            if not re.search(rf"changed{number}\b.*(; remove|to continue it, or remove)", str(error)):
                failed.append(f"{label}: {error}")
        except Exception as error:
            failed.append(f"{label}: {error!r}")
        shutil.rmtree(output)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", [PLAN, "00001.outcome.json"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_state_files_that_are_not_regular_are_not_read(small, name, make):
    unfinished(small)
    (small.path / "killed" / name).unlink()
    make(small.path / "killed" / name)
    with pytest.raises(DataError, match=f"{re.escape(name)} is damaged: it is not a regular file; remove"):
        run(small, "killed")


def test_files_of_others_are_kept(small, directory_bytes):
    unfinished(small)
    (small.path / "killed" / "notes.txt").write_text("mine")
    (small.path / "killed" / "00001.tokens.bin.1234.partial").write_text("left behind")
    run(small, "killed")
    assert (small.path / "killed" / "notes.txt").read_text() == "mine"
    assert not list((small.path / "killed").glob("*.partial"))


def test_two_runs_with_one_output_are_rejected(small):
    with Run(small.path / "shared"), pytest.raises(DataError, match="another run is writing to .*shared"):
        run(small, "shared")
    run(small, "shared")


def limited(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_space(bench, output: str, workers: int) -> None:
    limited(1 << 20)
    with pytest.raises(DataError, match="free space, then run the same command again"):
        run(bench, output, workers=workers)


def late_images(bench, new_sample) -> None:
    """100 records without images, followed by more images than a file may hold."""
    bench.file = bench.annotations([new_sample()] * 100 + [new_sample(image="a.png")] * 5, "late.json")
    bench.sources = [Source("late", str(bench.file), str(bench.path / "images"))]
    bench.settings = dataclasses.replace(bench.settings, records_per_shard=50, max_pixels=4194304)


def test_a_run_continues_after_a_full_disk(large, new_sample, directory_bytes):
    """A limit on the size of files acts like a full disk: writing fails in the middle."""
    late_images(large, new_sample)
    run(large, "complete")
    full = large.path / "full"
    done = subprocess.run(
        command(large, "full", 2), capture_output=True, text=True, preexec_fn=lambda: limited(1 << 20)
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"preprocess_data: {full}/00002.pictures.bin cannot be written (File too large); "
        "free space, then run the same command again"
    )
    left = {path.name for path in full.iterdir()}
    assert {"00000.outcome.json", "00001.outcome.json"} <= left and not [name for name in left if "partial" in name]
    assert in_child(lambda: without_space(large, "full", workers=1)) == 0
    run(large, "full")
    assert directory_bytes(full) == directory_bytes(large.path / "complete")


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_full_disk_is_reported_at_any_step(tmp_path, monkeypatch, step):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = atomic_files.AtomicFile(tmp_path / "a.bin") if step != "open" else None
    if step == "open":
        monkeypatch.setattr("builtins.open", full)
    elif step == "write":
        file._file.close()
        file._file = type("Full", (), {"write": full, "close": lambda self: None})()
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(DataError, match=r"a\.bin cannot be written \(No space left on device\); free space, then run"):
        file = file or atomic_files.AtomicFile(tmp_path / "a.bin")
        file.write(b"x")
        file.commit()
    assert list(tmp_path.iterdir()) == []
