"""A run that is left alone: it starts again after a hang, a kill and the loss of a machine, and trains the same."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed.run
from support.paths import GOLDEN, ROOT
from support.processes import run_forked

from neo_megatron import launch
from neo_megatron.run.start import OWN_STORE

WORKER = Path(__file__).parent / "failing_worker.py"
STEPS = 4


def flags(room: Path, save: Path) -> list[str]:
    """A run that saves every step and resumes from where it saves."""
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs", "--train-iters", str(STEPS)),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-4", "--lr-warmup-iters", "0"),
        *("--num-workers", "0", "--log-interval", "1", "--pretrained-checkpoint", f"{room}/golden"),
        *("--save", str(save), "--load", str(save), "--save-interval", "1"),
        *("--distributed-timeout-minutes", "2", "--distributed-timeout-seconds-after-init", "40"),
    ]


def losses(save: Path) -> list[float]:
    """Of all steps."""
    lines = [json.loads(line) for line in (save / "scalars.jsonl").read_text().splitlines()]
    return [line["lm loss"] for line in lines if "lm loss" in line]


@pytest.fixture(scope="module")
def expected(room, tmp_path_factory) -> list[float]:
    """Losses of a run in which nothing happens, on one process."""
    save = tmp_path_factory.mktemp("alone") / "run"
    done = run_forked("-m", "neo_megatron.pretrain_neo", *flags(room, save))
    assert done.returncode == 0, done.stdout
    return losses(save)


def start(*words: str, launcher: str = "neo_megatron.launch") -> subprocess.Popen[str]:
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", launcher, *words], env={**os.environ, **variables}, **output)


def printed(launcher: subprocess.Popen[str]) -> list[str]:
    """The lines of a launcher that has ended; it is killed with its ranks where it does not end."""
    try:
        return launcher.communicate(timeout=900)[0].splitlines()
    finally:
        if launcher.poll() is None:
            for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                process.kill()


def run(*words: str, restarts: int = 1) -> tuple[int, list[str]]:
    launcher = start("--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), str(WORKER), *words)
    lines = printed(launcher)
    return launcher.returncode, lines


def test_a_stopped_rank_is_named_and_the_run_goes_on(room, tmp_path, expected):
    save = tmp_path / "run"
    code, lines = run("stop", "1", *flags(room, save))
    told = [line for line in lines if line.startswith("pretrain_neo: ")]
    assert code == 0 and len(told) == 2, lines
    assert re.match(
        r"pretrain_neo: step 2 has made no progress for \d+ s: rank 1 \(process \d+ on \S+\) is st", told[0]
    )
    assert told[1].endswith("failed with exit code 1; starting all ranks again (1 of 1 restarts are left)")
    assert any(line.startswith("starting (restart 1 of 1), which takes") for line in lines)
    assert losses(save) == pytest.approx(expected, rel=2e-6)
    assert "failing_worker.py" in (save / "stacks" / "rank_00001.txt").read_text()


def test_a_slow_rank_is_named(room, tmp_path):
    steps = ("--train-iters", "12", "--global-batch-size", "2", "--save-interval", "12")
    code, lines = run("slow", "1", *flags(room, tmp_path), *steps)
    named = [line for line in lines if line.startswith("steps 1 to 10: ")]
    assert code == 0 and len(named) == 1, lines
    assert re.match(r"steps 1 to 10: rank 1 \(process \d+ on \S+\) is slow: ", named[0])
    scalars = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    compared = [it["step"] for it in scalars if it.get("performance/slowest rank over median", 0) > 1.2]
    assert compared in ([10], [11]), "once the times of all ranks are there"


@pytest.mark.thorough
def test_the_loss_of_a_machine_is_survived(room, tmp_path, expected):
    """Two machines of one rank; the second one, with its launcher, is killed in the second step."""
    save = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # The times after which a silent machine counts as lost, and for which further ones are waited for.
    times = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"
    place = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run")
    place += ("--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", times, "--max-restarts", "2", str(WORKER))
    machines = [start(*place, "kill machine", "none", *flags(room, save))]
    while machines[0].poll() is None and not _listens(port):
        time.sleep(0.1)
    machines.append(start(*place, "kill machine", "all", *flags(room, save)))
    first, second = map(printed, machines)
    assert [machine.returncode for machine in machines] == [0, -9], (first, second)
    assert any("starting all ranks again (2 of 2 restarts are left)" in line for line in first), first
    assert losses(save) == pytest.approx(expected, rel=2e-6)
    ranks = [json.loads(line).get("batch-size") for line in (save / "scalars.jsonl").read_text().splitlines()]
    assert set(filter(None, ranks)) == {4.0}


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.mark.thorough
def test_a_killed_rank_is_named_and_the_run_goes_on(room, tmp_path, expected):
    save = tmp_path / "run"
    code, lines = run("kill a training", "1", *flags(room, save))
    named = "pretrain_neo: local rank 1 was ended by SIGKILL; starting all ranks again (1 of 1 restarts are left)"
    assert code == 0 and named in lines, lines
    assert losses(save) == pytest.approx(expected, rel=2e-6)


@pytest.mark.thorough
def test_a_loader_worker_that_hangs_leaves_its_stack(room, tmp_path, expected):
    save = tmp_path / "run"
    longer = ("--distributed-timeout-seconds-after-init", "200")  # else the step is found to hang before the loader
    code, lines = run("deadlock loader", "1", *flags(room, save), "--num-workers", "1", *longer)
    assert code == 0 and any("worker 0 of 1 of the data loader has not delivered pack" in line for line in lines), lines
    stacks = (save / "stacks" / "rank_00001.txt").read_text()
    assert stacks.count("no micro-batch within 60 s") == 2 and "in deadlocked" in stacks
    assert "no micro-batch within 60 s" in (save / "stacks" / "rank_00000.txt").read_text()
    assert losses(save) == pytest.approx(expected, rel=2e-6)


def test_restarts_need_a_rendezvous_that_starts_again(tmp_path):
    launcher = start("--nproc-per-node", "1", "--max-restarts", "1", str(WORKER), "sentence", "all")
    assert printed(launcher)[-1].startswith("pretrain_neo: --max-restarts and --nnodes MIN:MAX need a rendezvous that")


@pytest.mark.parametrize("words", [(), ("--standalone",), ("--nnodes", "1"), ("--nnodes", "1:1")])
def test_a_start_that_nothing_follows_keeps_torchruns_store(words, monkeypatch):
    """Its own store would be on a port that was free a moment ago, and another process may take it."""
    asked = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: asked.append(os.environ.get(OWN_STORE)))
    monkeypatch.setenv(OWN_STORE, "")  # so that what the launcher sets is taken back
    for further, own in (((), None), (("--max-restarts", "1", "--rdzv-backend", "c10d"), "1")):
        monkeypatch.delenv(OWN_STORE)
        monkeypatch.setattr(sys, "argv", ["launch", *words, *further, "worker.py"])
        launch.main()
        assert asked.pop() == own
        os.environ[OWN_STORE] = ""


def test_torchrun_with_the_store_of_ended_ranks_is_refused():
    """They would find the addresses of those in it, and wait for them."""
    words = ("--standalone", "--max-restarts", "1", str(WORKER), "sentence", "all")
    lines = printed(start(*words, launcher="torch.distributed.run"))
    assert any("torchrun has started the ranks again with the store of those that have ended" in it for it in lines)
