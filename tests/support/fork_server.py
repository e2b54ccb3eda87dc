"""Starts Python programs by forking a process that has imported Megatron already, which costs seconds otherwise.

    python fork_server.py SOCKET

Requests come over the socket whose file descriptor is given. Each is JSON with `command` (a script, or `-m` and a
module, then its arguments), `environment`, `directory` and `ranks` (0: no launcher), and brings three file descriptors:
stdout, stderr, and a pipe for the exit code. Ranks meet in a store of their launch, as under torchrun, and when one of
them fails the others are killed. `support.processes` is the client.
"""

import argparse
import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

REQUEST = 1 << 20  # bytes
PR_SET_PDEATHSIG = 1


def preload() -> dict[str, str]:
    """Imports what a training needs, first what has to come before PyTorch; gives the variables that imports set."""
    before = set(os.environ)
    import neo_megatron.run.pretraining  # noqa: F401, I001

    import megatron.core.tokenizers.text  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from megatron.training.arguments import add_megatron_arguments
    from transformers import AutoTokenizer  # noqa: F401

    remember_help_texts()
    add_megatron_arguments(argparse.ArgumentParser())
    return {name: value for name, value in os.environ.items() if name not in before}


def remember_help_texts() -> None:
    """Megatron parses its own source for the help text of every flag, twice a run: 0.4 s of CPU time."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    original, known = ArgumentGroupFactory._get_field_docstrings, {}

    def get_field_docstrings(factory: ArgumentGroupFactory, dataclass: type) -> dict[str, str]:
        if dataclass not in known:
            known[dataclass] = original(factory, dataclass)
        return known[dataclass]

    ArgumentGroupFactory._get_field_docstrings = get_field_docstrings


def serve(requests: socket.socket, variables: dict[str, str]) -> list[str]:
    """Answers requests until the other end closes; returns in the forks alone: the command of the fork."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the launches
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, REQUEST, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return launch(json.loads(message), variables, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def launch(request: dict, variables: dict[str, str], output: int, errors: int, status: int) -> list[str]:
    """Starts the ranks and ends with them; returns in each of them."""
    end_with_parent()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(variables | request["environment"])
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    listening = socket.create_server(("127.0.0.1", 0)) if request["ranks"] else None
    ranks = []
    for rank in range(max(request["ranks"], 1)):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            end_with_parent()
            os.close(status)
            os.dup2(output, 1)
            os.dup2(errors, 2)
            # Those of the server may be of another kind of file, and look for their place in it.
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
            if listening:
                os.environ.update(rank_variables(rank, request["ranks"], listening.getsockname()[1]))
                listening.close()
            return request["command"]
    for stream in (1, 2, output, errors):  # their reader waits for the last rank
        os.dup2(null, stream)
    wait_for(ranks, listening, status)


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun gives to a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in (numbers | store).items()}


def wait_for(ranks: list[int], listening: socket.socket | None, status: int) -> NoReturn:
    """Keeps the store of the ranks until they end, and writes the first exit code that is not zero."""
    if listening:
        from torch.distributed import TCPStore

        _store = TCPStore(
            "127.0.0.1",
            listening.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
    code, left = 0, set(ranks)
    while left:
        ended, how = os.wait()
        left.discard(ended)
        if how and not code:
            code = os.waitstatus_to_exitcode(how)
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    os.write(status, str(code).encode())
    os._exit(0)


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    variables = preload()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: forks would lack all but one"
    command = serve(requests, variables)
    module = command[0] == "-m"
    program = command[1 if module else 0]
    sys.argv = command[1:] if module else command
    sys.path[0] = os.getcwd() if module else str(Path(program).resolve().parent)
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    # Freeing all that was imported, object by object, takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
