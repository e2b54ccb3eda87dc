"""Tasks of lmms-eval while a run is followed: which command is run, what is kept of its results, and its failures.

`tests/lmms_eval_plugin/test_cli.py` runs lmms-eval itself, and reads its files with the same function.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.errors import ConfigError, DataError
from neo_megatron.follow.lmms_eval import LmmsEval, lmms_eval_results
from neo_megatron.inference.batches import Task

SETTINGS = PreprocessConfig(min_pixels=4096, max_pixels=65536, chat_layout="u1")
RESULTS = {
    "mme": {
        "alias": "mme",
        "score,none": 0.25,
        "score_stderr,none": 0.01,
        "count,strict": 3,
        "bad,none": float("nan"),
        "listed,none": [1],
        "flag,none": True,
    }
}
KEPT = {"mme": {"score": 0.25, "count,strict": 3}}
STAND_IN = f"""#!{sys.executable}
import json, os, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
room = os.path.join(flags["--output_path"], "neo")
os.mkdir(room)
with open(os.path.join(room, "20260101_results.json"), "w") as file:
    json.dump({{"results": {json.dumps(RESULTS).replace("NaN", "float('nan')").replace("true", "True")}}}, file)
print(json.dumps(flags))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    """A stand-in for lmms-eval that prints its flags."""
    path = tmp_path / "stand-in"
    path.write_text(STAND_IN)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_command_and_its_results(program, tmp_path):
    task = Task(tmp_path / "step-2", "bfloat16", SETTINGS, 5, system="Be terse, please.", image_text="numbered")
    output = tmp_path / "out" / "step-2"
    LmmsEval([str(program)], ["mme", "docvqa"], 7).run(task, output)
    flags = json.loads((output / "log.txt").read_text())
    assert flags["--model"] == "neo" and flags["--tasks"] == "mme,docvqa" and flags["--batch_size"] == "7"
    arguments = dict(part.split("=") for part in flags["--model_args"].split(","))
    assert Path(arguments.pop("system_prompt")).name == "system.txt"
    assert (output / "system.txt").read_text() == "Be terse, please."
    assert arguments == {
        **{"pretrained": str(tmp_path / "step-2"), "dtype": "bfloat16", "chat_layout": "u1", "image_text": "numbered"},
        **{"min_pixels": "4096", "max_pixels": "65536"},
    }
    assert lmms_eval_results(output) == KEPT and os.listdir(tmp_path / "out") == ["step-2"]


def test_failures_name_the_log(tmp_path):
    task, output = Task(tmp_path / "neo", "auto", SETTINGS, 5), tmp_path / "out" / "step-2"
    with pytest.raises(DataError, match="/nowhere/python cannot be started .*correct --lmms-eval-command"):
        LmmsEval(["/nowhere/python"], ["mme"], 1).run(task, output)
    for end, code in (("print('out of luck')", 0), ("raise SystemExit(3)", 3)):
        with pytest.raises(DataError, match=rf"no results \(exit code {code}\): .*step-2.partial/log.txt says why"):
            LmmsEval([sys.executable, "-c", end], ["mme"], 1).run(task, output)
        assert not output.exists()
    with pytest.raises(ConfigError, match="a,b: , and = divide its arguments; choose another --output"):
        LmmsEval([sys.executable, "-c", ""], ["mme"], 1).run(replace(task, model=tmp_path / "a,b"), output)


def test_it_ends_with_its_parent(tmp_path):
    """Also where the parent is killed."""
    script = f"""
from pathlib import Path
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.follow.lmms_eval import LmmsEval
from neo_megatron.inference.batches import Task
waits = "import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(600)"
task = Task(Path("neo"), "auto", PreprocessConfig(min_pixels=4096, max_pixels=65536), 5)
LmmsEval(["{sys.executable}", "-c", waits], ["mme"], 1).run(task, Path("{tmp_path}/out/step-2"))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_scores_of_lmms_eval_in_all_that_follow_writes(trained, run, follow, program, tmp_path, monkeypatch):
    """Each export once: a run that is killed after it does not run it again."""
    command = ["--lmms-eval-tasks", "mme", "--lmms-eval-command", f"'{program}'"]

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neo_megatron.follow.following.evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            follow(run, tmp_path / "out", *command)
    log = tmp_path / "out" / "lmms-eval" / "step-2" / "log.txt"
    written = log.stat().st_mtime_ns
    follow(run, tmp_path / "out", *command)
    assert log.stat().st_mtime_ns == written and "exports/step-2" in log.read_text()
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["lmms_eval"] for row in rows] == [KEPT] * 3
    assert "<td>mme</td><td>count,strict</td>" in (tmp_path / "out" / "page.html").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.events / "scores")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lmms-eval/mme/score")] == [
        *((2, 0.25), (4, 0.25), (6, 0.25))
    ]
    with pytest.raises(DataError, match="has evaluations with another --lmms-eval-tasks"):
        (tmp_path / "out" / "evaluations" / "step-6" / "answers.jsonl").unlink()
        follow(run, tmp_path / "out")


def test_a_command_without_tasks_is_a_usage_error(run, follow, tmp_path, capsys):
    for further in (["--lmms-eval-command", "python"], ["--lmms-eval-tasks", "mme", "--lmms-eval-command", " "]):
        with pytest.raises(SystemExit):
            follow(run, tmp_path / "out", *further)
        assert "--lmms-eval-command is a command, and goes with --lmms-eval-tasks" in capsys.readouterr().err
