"""Processes of a pool are deaf to Ctrl-C at any moment, and leave it to the process that started them."""

import os
import signal

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
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Interrupted(target=print).start()
