"""`examples/slurm.sbatch` under commands that stand in for Slurm's: what it starts, and what it does on signals."""

import os
import signal
import subprocess
import time

import pytest
from support.paths import ROOT

# `srun` starts two tasks, passes SIGUSR1 on to them, and kills them on SIGTERM.
SRUN = """#!/usr/bin/env bash
echo "srun $1" >> "$LOG"
shift
export SLURM_NTASKS=2 SLURM_LOCALID=0
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
trap 'kill -KILL $first $second; exit 137' TERM
for task in $first $second; do
  until wait $task; do
    status=$?
    kill -0 $task 2>/dev/null || exit $status
  done
done
"""
# A rank, started in the place of Python, that trains until it is told to stop, which then takes it a second.
RANK = """#!/usr/bin/env bash
echo "rank $RANK of $WORLD_SIZE local $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*" >> "$LOG"
[ "$TRAINING" = ends ] && exit 0
[ "$TRAINING" = fails ] && exit 7
trap 'sleep 1; echo "rank $RANK saved" >> "$LOG"; exit 0' USR1
echo ready >> "$LOG"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$LOG"
[ "$1" != show ] || printf 'node7\\nnode8\\n'
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as Slurm does; gives the process and the log of the stand-ins."""
    for name, content in {"srun": SRUN, "python": RANK, "scontrol": SCONTROL, "torchrun": "exit 99"}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    variables = {
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "PACKS": "packs", "OUTPUT": "run"},
        **{"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-8]"},
    }
    processes = []

    def start(training):
        process = subprocess.Popen(
            ["bash", "examples/slurm.sbatch", "neo-9b", "1", "--lr", "1e-4"],
            cwd=ROOT,
            env={**os.environ, **variables, "TRAINING": training},
            start_new_session=True,
        )
        processes.append(process)
        return process, log

    yield start
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_every_rank_is_a_task_with_its_place(job):
    process, log = job("ends")
    assert process.wait(30) == 0
    lines = log.read_text().splitlines()
    assert lines[:2] == ["scontrol show hostnames node[7-8]", "srun --kill-on-bad-exit=1"]
    for rank, line in enumerate(sorted(lines[2:])):
        assert line.startswith(f"rank {rank} of 2 local 0 at node7:20123: -m neo_megatron.pretrain_neo")
        assert "--context-parallel-size 2 --pipeline-model-parallel-layout Ettt|" in line and line.endswith(
            "--lr 1e-4 --exit-signal SIGUSR1"
        )
    assert len(lines) == 4, "ended by itself, so it is not queued again"


def test_a_failure_is_not_queued_again(job):
    process, log = job("fails")
    assert process.wait(30) == 7
    assert "requeue" not in log.read_text()


@pytest.mark.parametrize("signals", [[signal.SIGUSR1], [signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]])
def test_a_signal_saves_on_all_ranks_and_queues_again(job, signals):
    process, log = job("goes on")
    deadline = time.time() + 30
    while log.read_text().count("ready") < 2 and time.time() < deadline:
        time.sleep(0.05)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    assert process.wait(30) == 0
    lines = log.read_text().splitlines()
    assert sorted(line for line in lines if "saved" in line) == ["rank 0 saved", "rank 1 saved"]
    assert lines[-1] == "scontrol requeue 40123"
