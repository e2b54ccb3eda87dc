"""A rank that makes no progress ends, with the stacks of all ranks and the name of the one that they wait for."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

WORKER = Path(__file__).with_name("hanging_process.py")
SECONDS = 10.0  # of a collective; a busy machine starts all processes of this file within four fifths of it


class Ranks:
    """Ranks of a run, each of which stands still in its way, and what has the file of the first one open."""

    def __init__(self, save: Path, *ways: str, seconds: float = SECONDS) -> None:
        self.save = save
        self.processes: list[subprocess.Popen[str]] = []
        (save / "stacks").mkdir(parents=True)
        (save / "stacks" / "rank_00000.txt").touch()
        self.reader = subprocess.Popen(["tail", "-f", save / "stacks" / "rank_00000.txt"], stdout=subprocess.DEVNULL)
        for rank, way in enumerate(ways):
            words = [sys.executable, WORKER, save, rank, len(ways), seconds, way]
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(list(map(str, words)), env={"PYTHONPATH": str(ROOT)}, **output)
            self.processes.append(process)

    def end(self, rank: int) -> tuple[int, list[str]]:
        """Exit code, and all lines that a rank printed."""
        printed = self.processes[rank].communicate(timeout=60)[0]
        return self.processes[rank].returncode, printed.splitlines()

    def stacks(self, rank: int) -> str:
        return (self.save / "stacks" / f"rank_{rank:05d}.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Ranks]]:
    """All runs of this file, which stand still at the same time."""
    save = tmp_path_factory.mktemp("runs")
    runs = {
        "stopped": Ranks(save / "stopped", "waits", "stopped", "waits"),
        "fifo": Ranks(save / "fifo", "fifo", "waits"),
        "lock of Python": Ranks(save / "lock", "lock of Python", "waits"),
        "waits": Ranks(save / "waits", "waits", "waits"),
        "worker": Ranks(save / "worker", "worker"),
        "alone": Ranks(save / "alone", "lock of Python"),
        "gone": Ranks(save / "gone", "waits", "gone"),
        "slow": Ranks(save / "slow", "slow", seconds=SECONDS / 2),
    }
    yield runs
    for run in runs.values():
        for process in (*run.processes, run.reader):
            process.kill()
            process.communicate()


def test_a_stopped_rank_is_named_and_writes_its_stack_once_it_is_continued(runs):
    run = runs["stopped"]
    code, (_, sentence) = run.end(0)
    assert code == 1 and re.fullmatch(
        rf"step 7 has made no progress for \d+ s: rank 1 \(process {run.processes[1].pid} on \S+\) is stopped, as by "
        rf"SIGSTOP; the Python stacks of the ranks are in {run.save}/stacks: the same command resumes; if it was "
        "merely slow, raise --distributed-timeout-seconds-after-init, of which 80% are waited",
        sentence,
    )
    for rank in (0, 1, 2):
        run.end(rank)
        assert 'hanging_process.py", line' in run.stacks(rank)
    assert "is stopped, as by SIGSTOP" in run.stacks(1) and "in all_reduce" in run.stacks(2)


@pytest.mark.parametrize("way", ["fifo", "lock of Python"])
def test_a_rank_is_named_with_its_place(runs, way):
    """The second one cannot run Python at all: others write its stack."""
    code, (_, sentence) = runs[way].end(1)
    assert code == 1 and f"rank 0 (process {runs[way].processes[0].pid} on " in sentence
    assert re.search(r"stands at \S*hanging_process.py:\d+ \(stand_still\)", sentence) and "rank 1 (" not in sentence


def test_ranks_that_wait_for_one_another(runs):
    assert "all ranks wait, for one another or their GPUs: rank 0 (process" in runs["waits"].end(1)[1][1]


def test_the_stack_of_a_loader_worker_is_written(runs):
    code, (*_, sentence) = runs["worker"].end(0)
    assert code == 1 and "(stand_still)" in sentence
    parts = runs["worker"].stacks(0).split("---- ")[1:]
    assert len({part.split(":")[2] for part in parts}) == len(parts) == 2, "two processes"


def test_a_rank_that_is_alone_and_cannot_run_python_ends(runs):
    code, lines = runs["alone"].end(0)
    assert code == 1 and lines == ["begun"]
    assert "Timeout (0:00:09" in runs["alone"].stacks(0) and "in stand_still" in runs["alone"].stacks(0)


def test_a_rank_that_has_ended_is_named(runs):
    pid = runs["gone"].processes[1].pid
    assert re.search(rf": rank 1 \(process {pid} on \S+\) is gone;", runs["gone"].end(0)[1][1])


def test_progress_is_no_hang(runs):
    assert runs["slow"].end(0) == (0, ["begun", "done"])


def test_nothing_but_ranks_is_signalled(runs):
    """Each file of a first rank is open in another program, which the signal would end."""
    assert runs["fifo"].end(0)[0] == 1
    assert [run.reader.poll() for run in runs.values()] == [None] * len(runs)
