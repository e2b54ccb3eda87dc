"""How a training ends that cannot go on: the sentence is the last line and told once; the log has everything."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.paths import GOLDEN, ROOT
from support.processes import run_forked

from neo_megatron.checkpoint.integrity import stored_pieces, verify_pieces
from neo_megatron.checkpoint.run_directory import RunDirectory

WORKER = Path(__file__).parent / "failing_worker.py"


def flags(room: Path, save: Path | None) -> list[str]:
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs", "--train-iters", "3"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-4", "--lr-warmup-iters", "0"),
        *("--num-workers", "0", "--log-interval", "1", "--pretrained-checkpoint", f"{room}/golden"),
        *(("--save", str(save)) if save else ()),
        *("--distributed-timeout-minutes", "2"),
    ]


def command(*words: str, launcher: str = "neo_megatron.launch") -> list[str]:
    return [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", "2", *map(str, words)]


def environment() -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **variables}


def run(words: list[str]) -> tuple[int, list[str]]:
    """Exit code, and the lines of stdout and stderr together."""
    done = subprocess.run(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("way", "who", "sentence"),
    [
        ("sentence", "1", "pretrain_neo: a sentence with a remedy"),
        ("sentence", "all", "pretrain_neo: a sentence with a remedy"),
        (
            "full disk",
            "0",
            "pretrain_neo: /some/file cannot be written (No space left on device): free space, then run",
        ),
        ("package", "all", "pretrain_neo: the package no_such_package is not installed in "),
        (
            "kill",
            "1",
            "pretrain_neo: rank 1 was ended by SIGKILL, as the system does when memory runs out; its log is ",
        ),
        ("kill loader", "1", "pretrain_neo: a worker of the data loader (process "),
    ],
)
def test_the_sentence_is_the_last_line_and_told_once(room, tmp_path, way, who, sentence):
    began = time.monotonic()
    workers = ("--num-workers", "1") if way == "kill loader" else ()
    code, lines = run(command(WORKER, way, who, *flags(room, tmp_path / "run"), *workers))
    assert code == 1 and lines[-1].startswith(sentence), lines
    assert sum(line.startswith("pretrain_neo: ") for line in lines) == 1
    assert not any("Traceback" in line for line in lines), lines
    assert time.monotonic() - began < 100, "the other rank did not wait for a collective's timeout"
    logs = [(tmp_path / "run" / "logs" / f"rank_0000{rank}.log").read_text() for rank in (0, 1)]
    for rank, log in enumerate(logs):
        assert ("the last line before the end" in log) == (who in ("all", str(rank)))


@pytest.mark.parametrize(
    ("way", "who", "how", "sentence"),
    [
        ("no more room", "1", (), "iter_0000002/__1_0.distcp cannot be written (File too large): free space, then run"),
        (
            "no more room",
            "0",
            ("--async-save",),
            "__0_0.distcp cannot be written (File too large): free space, then run",
        ),
    ],
)
def test_a_save_that_fails_is_told_and_the_one_before_stays_complete(room, tmp_path, way, who, how, sentence):
    """In the second step; the first one was saved."""
    saved = tmp_path / "run"
    code, lines = run(command(WORKER, way, who, *flags(room, saved), "--save-interval", "1", *how))
    assert code == 1 and lines[-1].startswith("pretrain_neo: ") and sentence in lines[-1], lines
    assert not any("Traceback" in line for line in lines), lines
    # In the background the first save may not have ended either.
    assert RunDirectory(saved).named() == 1 or (how == ("--async-save",) and RunDirectory(saved).named() is None)
    if RunDirectory(saved).named() is None:
        return
    verify_pieces(stored_pieces(saved / "iter_0000001"))


def test_a_killed_background_save_is_told(room, tmp_path):
    """It may come before the first save has ended, so nothing is said of what is there."""
    way = flags(room, tmp_path / "run")
    code, lines = run(command(WORKER, "kill savers", "0", *way, "--save-interval", "1", "--async-save"))
    assert code == 1 and "the process that saves in the background has ended (exit code -9" in lines[-1], lines
    assert lines[-1].startswith("pretrain_neo: ") and not any("Traceback" in line for line in lines), lines


def test_a_bug_keeps_its_traceback(room, tmp_path):
    code, lines = run(command(WORKER, "bug", "1", *flags(room, tmp_path / "run")))
    assert code == 1 and lines[-1].startswith(
        "pretrain_neo: rank 1 failed with exit code 1: TypeError: a bug; its log is "
    )
    assert lines.count("TypeError: a bug") == 1 and any("failing_worker.py" in line for line in lines)
    assert "TypeError: a bug" in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()


def test_the_report_of_torchrun_has_the_sentence(room, tmp_path):
    words = command(WORKER, "sentence", "all", *flags(room, tmp_path / "run"), launcher="torch.distributed.run")
    code, lines = run(words)
    said = [line for line in lines if "a sentence with a remedy" in line]
    assert code == 1 and said == ["  traceback : pretrain_neo: a sentence with a remedy"]
    assert lines.index(said[0]) == len(lines) - 2, "before the lower edge of the report"


def test_the_sentence_of_one_machine_ends_all_of_them():
    """Two machines of two ranks; the other three ranks hang, as in a collective of NCCL, which notices nothing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    machines = []
    for number, launcher in enumerate(("neo_megatron.launch", "torch.distributed.run")):
        place = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", "localhost", "--master-port", port)
        words = [sys.executable, "-m", launcher, "--nproc-per-node", "2", *place, str(WORKER), "sentence and hang", "3"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        machines.append(subprocess.Popen(words, env=environment(), **output))
    try:
        first, second = (machine.communicate(timeout=100)[0].splitlines() for machine in machines)
    finally:
        for machine in machines:
            if machine.poll() is None:
                for process in (*psutil.Process(machine.pid).children(recursive=True), machine):
                    process.kill()
    assert [machine.returncode for machine in machines] == [1, 1]
    assert first == ["pretrain_neo: a sentence with a remedy"]
    assert sum("a sentence with a remedy" in line for line in second) == 1, second
    assert not any("recvValue failed" in line for line in second), "the store was there until the machines had seen it"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_traceback(room, tmp_path, number):
    """To all processes, as a terminal and a scheduler do; one rank hangs."""
    log = tmp_path / "run" / "logs" / "rank_00001.log"
    words = command(WORKER, "hang", "1", *flags(room, tmp_path / "run"), "--num-workers", "1")
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while (not log.exists() or "words of C++" not in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, number)
    printed = process.communicate(timeout=100)[0]
    words = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}[number]
    assert printed.splitlines()[-1] == f"pretrain_neo: {words}" and "Traceback" not in printed, printed
    assert process.returncode == 128 + number


def test_what_the_screen_shows(room, tmp_path):
    """One process without a launcher, started twice: the second run goes on, and so does its log."""
    saved = tmp_path / "run"
    words = ["-m", "neo_megatron.pretrain_neo", *flags(room, saved), "--load", str(saved)]

    def run(words: list[str]) -> tuple[int, list[str]]:
        done = run_forked(*words)
        return done.returncode, done.stdout.splitlines()

    for iterations in ("1", "2"):
        code, lines = run([*words, "--train-iters", iterations, "--override-opt-param-scheduler"])
        assert code == 0, lines
        assert any(line.startswith(f"iteration {iterations}/{iterations} | loss 1") for line in lines)
        assert f"iteration {iterations} | checkpoint saved to {saved}" in lines
        assert any(
            line.startswith("training stage 2, pipeline stage 0: 441,760 of 441,760 parameters") for line in lines
        )
        assert len(lines) < 15, lines
    log = (saved / "logs" / "rank_00000.log").read_text()
    assert log.count("==== 2") == 2 and "end of arguments" in log and "iteration        1/       1" in log
    code, lines = run([*words, "--no-such-flag"])
    assert code == 1 and lines[-1] == "pretrain_neo: unrecognized arguments: --no-such-flag; --help lists all flags"
    code, lines = run([*words, "--train-iters", "2", "--console-log", "full", "--override-opt-param-scheduler"])
    assert code == 0 and any("end of arguments" in line for line in lines)
