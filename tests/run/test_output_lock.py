"""One run at a time saves into a directory: kills, dead owners, other machines."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.paths import ROOT

from neo_megatron.errors import ConfigError
from neo_megatron.run.output_lock import NAME, OutputLock, Owner
from neo_megatron.run.start import check_paths

# Takes the lock, says so and waits to be ended.
HOLDER = """
import sys, time
from neo_megatron.run.output_lock import OutputLock
OutputLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(100)
"""


def lock(directory: Path) -> OutputLock:
    return OutputLock(directory, beat=0.05, silence=0.5)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write(directory: Path, owner: Owner) -> None:
    (directory / NAME).write_text(json.dumps(asdict(owner)))


def elsewhere(**changed) -> Owner:
    """An owner of which this machine sees no process."""
    return replace(Owner.this_process(), host="node7", kernel="another boot", **changed)


def test_the_second_run_is_refused_until_the_first_ends(tmp_path):
    first, second = lock(tmp_path / "run"), lock(tmp_path / "run")
    first.acquire()
    with pytest.raises(ConfigError, match=rf"belongs to a run that is alive \(process {os.getpid()} on "):
        second.acquire()
    with pytest.raises(ConfigError, match="is alive"):
        check_paths(["--save", str(tmp_path / "run")])  # before slow imports
    check_paths(["--save", str(tmp_path / "run"), "--dry-run"])
    second.release()  # of a run that was refused
    first.check()
    first.release()
    assert not list((tmp_path / "run").iterdir())
    second.acquire()
    second.release()


def test_a_killed_process_holds_no_lock(tmp_path, holder, capsys):
    with pytest.raises(ConfigError, match=f"process {holder.pid} on "):
        lock(tmp_path).acquire()
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, though its parent has not asked for it
    own = lock(tmp_path)
    own.acquire()
    assert f"left by a run that is dead (process {holder.pid}" in capsys.readouterr().out
    own.release()
    assert not list(tmp_path.iterdir())


def test_a_stopped_process_keeps_its_lock(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="alive"):
        lock(tmp_path).acquire()


def test_a_reused_process_id_is_another_process(tmp_path):
    write(tmp_path, replace(Owner.this_process(), started="1"))
    own = lock(tmp_path)
    own.acquire()
    own.release()


def test_the_heartbeat_decides_for_other_machines(tmp_path, capsys):
    write(tmp_path, elsewhere())
    own = lock(tmp_path)
    own.acquire()
    assert "which cannot be seen from here: watching its heartbeat" in capsys.readouterr().out
    own.release()

    alive = lock(tmp_path)
    alive.acquire()
    write(tmp_path, replace(alive._mine, host="node7", kernel="another boot"))  # as its heartbeat looks from elsewhere
    with pytest.raises(ConfigError, match="on node7, since"):
        lock(tmp_path).acquire()
    alive.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", '{"token": "a"}', "[]"])
def test_a_half_written_lock_does_not_block_forever(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    own = lock(tmp_path)
    own.acquire()
    own.release()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_directory_was_taken_over_stops(tmp_path):
    first = lock(tmp_path)
    first.acquire()
    write(tmp_path, elsewhere(token="another run"))
    deadline = time.monotonic() + 20
    with pytest.raises(ConfigError, match="taken over by another run .* saves nothing more"):
        while time.monotonic() < deadline:
            first.check()
            time.sleep(0.02)
    first.release()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "another run"


def test_a_lock_that_somebody_deleted_comes_back(tmp_path):
    own = lock(tmp_path)
    own.acquire()
    (tmp_path / NAME).unlink()
    deadline = time.monotonic() + 20
    while not (tmp_path / NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ConfigError, match="alive"):
        lock(tmp_path).acquire()
    own.release()


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    own = lock(tmp_path)
    own.acquire()
    with pytest.raises(ConfigError, match="alive"):
        lock(tmp_path).acquire()
    own.release()
    assert not list(tmp_path.iterdir())


def test_one_of_many_simultaneous_starts_wins(tmp_path):
    """All at once, over the lock of a dead run."""
    write(tmp_path, replace(Owner.this_process(), started="1"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT},
        )
        for _ in range(4)
    ]
    said = []
    while len(said) < 3:
        ended = [process for process in processes if process.poll() is not None]
        said = [process.stdout.read() for process in ended] if len(ended) == 3 else []
        time.sleep(0.05)
    assert not any("held" in text for text in said)
    for process in processes:
        process.kill()
        process.wait()
