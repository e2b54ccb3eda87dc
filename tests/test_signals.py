"""How a tool ends that is told to, or whose reader has gone: soon, without a traceback, and nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.golden_packs import TOOLS, make_packs
from support.paths import GOLDEN

from neo_megatron import processes
from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.processes import StoppedWorkers

ENDS_BY = {signal.SIGINT: "interrupted", signal.SIGTERM: "", signal.SIGHUP: "", signal.SIGQUIT: ""}
HANG = 60  # seconds
# What Python says of Ctrl-C while it starts, and while the first line of a tool finds the module that handles it.
NOT_YET_OURS = ("Fatal Python error: init_import_site", "from neo_megatron.cli.entry import run_command\n")
WORK = {
    "preprocess_data": "--input {room}/many.json --image-root {golden} --tokenizer {golden}/tokenizer --workers 2 "
    "--min-pixels 4096 --max-pixels 65536 --output {output}",
    "pack_data": "--data {room}/shards --seq-length 192 --output {output}",
    "verify_data": "--data {room}/packs --workers 2",
    "inspect_data": "--packs {room}/packs --output {output}",
    "convert_checkpoint": "hf-to-megatron --hf {golden}/ckpt_untied --output {output}",
    "verify_checkpoint": "{golden}/ckpt_untied {room}/megatron",
    "generate": "--model {golden}/ckpt_untied --input {room}/many.json --image-root {golden} --output {output}",
    "evaluate": "--model {golden}/ckpt_untied --input {room}/many.json --image-root {golden} --output {output}",
    "follow": "{room}/megatron --input {room}/many.json --image-root {golden} --tokenizer {golden}/tokenizer "
    "--output {output}",  # waits for the first checkpoint
    "plan": "--neo-model neo-9b --search --gpus 16",
    "benchmark": "data --only packing",
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("signals")
    make_packs(room, repeats=40, seq_length=192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "megatron")
    (room / "many.json").write_text("[" + ", ".join([(room / "annotations.json").read_text()[1:-1]] * 200) + "]")
    return room


def start(tool: str, room: Path, output: Path, **how) -> subprocess.Popen:
    """The tool, in a session of its own."""
    words = WORK[tool].format(room=room, golden=GOLDEN, output=output).split()
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **how}
    return subprocess.Popen(
        [sys.executable, TOOLS / f"{tool}.py", *words],
        env=environment,
        start_new_session=True,
        **how,
    )


def of_session(leader: int) -> list[psutil.Process]:
    """Processes that still run in a session, those of a tokenizer's reader excepted, which has its own."""
    return [process for process in psutil.process_iter() if in_session(process, leader)]


def in_session(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def check_end(tool: str, number: signal.Signals, to_group: bool, seconds: float, room: Path, output: Path) -> None:
    process = start(tool, room, output)
    time.sleep(seconds)
    (os.killpg if to_group else os.kill)(process.pid, number)
    printed = process.communicate(timeout=HANG)[0].decode()
    if any(words in printed for words in NOT_YET_OURS):
        return
    assert "Traceback" not in printed, printed
    if process.returncode == 0:
        return  # it was done
    assert process.returncode in (-number, 128 + number), printed
    assert ENDS_BY[number] in printed.splitlines()[-1] if process.returncode == 128 + number else True, printed
    deadline = time.monotonic() + HANG
    while (left := of_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


@pytest.mark.parametrize(
    ("tool", "number", "to_group", "seconds"),
    [
        ("preprocess_data", signal.SIGTERM, False, 4),
        ("preprocess_data", signal.SIGHUP, True, 2),
        ("verify_data", signal.SIGQUIT, False, 4),
        ("verify_data", signal.SIGTERM, True, 3),
        ("evaluate", signal.SIGINT, False, 1),
        ("follow", signal.SIGTERM, False, 8),
    ],
)
def test_a_tool_ends_when_it_is_told_to(room, tmp_path, tool, number, to_group, seconds):
    check_end(tool, number, to_group, seconds, room, tmp_path / "output")


@pytest.mark.thorough
@pytest.mark.parametrize("seconds", [0.1, 0.4, 1, 2.5, 5, 9])
@pytest.mark.parametrize("to_group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("number", ENDS_BY)
@pytest.mark.parametrize("tool", WORK)
def test_every_tool_ends_at_any_moment(room, tmp_path, tool, number, to_group, seconds):
    check_end(tool, number, to_group, seconds, room, tmp_path / "output")


def check_reader_that_leaves(tool: str, room: Path, output: Path) -> None:
    """As `tool --help | true` and more: the first write finds nobody."""
    reads, writes = os.pipe()
    os.close(reads)
    process = start(tool, room, output, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    said = process.communicate(timeout=300)[1].decode()
    assert "Traceback" not in said and "BrokenPipe" not in said, said
    assert process.returncode in (0, 128 + signal.SIGPIPE), said


def check_full_device(tool: str, room: Path, output: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(tool, room, output, stdout=full, stderr=subprocess.PIPE)
        said = process.communicate(timeout=300)[1].decode()
    assert "Traceback" not in said, said
    if process.returncode:
        assert process.returncode == 1 and "No space left on device" in said.splitlines()[-1], said


def test_a_reader_that_has_gone_is_no_error(room, tmp_path):
    check_reader_that_leaves("plan", room, tmp_path / "output")
    check_reader_that_leaves("inspect_data", room, tmp_path / "output")


def test_a_full_device_is_a_sentence(room, tmp_path):
    check_full_device("plan", room, tmp_path / "output")


@pytest.mark.thorough
@pytest.mark.parametrize("tool", [name for name in WORK if name not in ("benchmark", "generate", "evaluate", "follow")])
@pytest.mark.parametrize("check", [check_reader_that_leaves, check_full_device])
def test_no_tool_minds_its_reader(room, tmp_path, tool, check):
    if tool == "preprocess_data":
        (room / "many.json").write_text((room / "annotations.json").read_text())
    check(tool, room, tmp_path / "output")


def test_a_stopped_worker_is_named_once_and_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_STOPPED", 0.0)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        stopped = StoppedWorkers()
        stopped.look([worker.pid])
        assert capsys.readouterr().err == ""
        for _ in range(2):
            worker.send_signal(signal.SIGSTOP)
            while psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.05)
            stopped.look([worker.pid])
            stopped.look([worker.pid])
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"worker process {worker.pid} is stopped (SIGSTOP)" in said
            assert f"kill -CONT {worker.pid}" in said
            worker.send_signal(signal.SIGCONT)
            while psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED:
                time.sleep(0.05)
            stopped.look([worker.pid])
            assert capsys.readouterr().err == ""
    finally:
        worker.kill()
        worker.wait()
    stopped.look([worker.pid])
