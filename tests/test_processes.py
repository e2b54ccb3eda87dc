"""Processes of a pool are deaf to Ctrl-C at any moment, and leave it to the process that started them."""

import os
import signal
import subprocess
import sys

import pytest

from neo_megatron.processes import SPAWN


def serve(pipe) -> None:
    pipe.send("ready")
    pipe.recv()


def test_ctrl_c_reaches_only_the_parent(capfd):
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    os.kill(process.pid, signal.SIGINT)  # at its first instruction
    assert ours.recv() == "ready"
    os.kill(process.pid, signal.SIGINT)
    ours.send("end")
    process.join(60)
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""


def test_ctrl_c_while_a_process_starts_is_not_lost():
    class Interrupted(SPAWN.Process):
        @staticmethod
        def _Popen(process):
            signal.raise_signal(signal.SIGINT)  # to this thread: another would take it at a later moment

    with pytest.raises(KeyboardInterrupt):
        Interrupted(target=print).start()


STARTS_ONE = """
import os, signal, sys, time
from neo_megatron.processes import SPAWN

def wait(pipe):
    pipe.send(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    ours, theirs = SPAWN.Pipe()
    SPAWN.Process(target=wait, args=(theirs,)).start()
    print(ours.recv(), flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, number):
    (tmp_path / "starts_one.py").write_text(STARTS_ONE)
    command = [sys.executable, str(tmp_path / "starts_one.py"), str(int(number))]
    # Its output ends only when both processes have ended.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == -number and done.stderr == ""
