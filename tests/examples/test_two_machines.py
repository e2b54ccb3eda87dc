"""The quickstart on two machines: two network namespaces, which reach each other by a cable of their own alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.thorough

LAYOUTS = {
    "dp2": "--use-distributed-optimizer",
    "pp2": "--pipeline-model-parallel-size 2 --pre-buffer-pipeline-stages 1",
    "cp2": "--context-parallel-size 2",
}
STEPS = {"SHAPE_STEPS": "10", "QUESTION_STEPS": "20"}
KILLED, LAST = 6, 12  # steps: before and after the one machine is killed
MINUTE = 60


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Machines:
    """Two machines."""

    names: tuple[str, str]
    port: int = 6000

    def start(self, number: int, *command: str | Path, log: Path, **variables: str) -> subprocess.Popen:
        """A command on one of them, as a node of the job, in a process group of its own."""
        environment = {
            **os.environ,
            **variables,
            **{"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(self.port)},
            **{"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        }
        with log.open("w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *map(str, command)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, number: int) -> None:
        """Kills all processes of one of them."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[number]], check=True, capture_output=True, text=True)
        for process in map(int, listed.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def run(self, *command: str | Path, log: Path, **variables: str) -> None:
        """A command on both, to its end."""
        self.port += 1
        nodes = [self.start(n, *command, log=log.with_suffix(f".{n}.log"), **variables) for n in range(2)]
        codes = [node.wait(timeout=30 * MINUTE) for node in nodes]
        assert codes == [0, 0], "\n".join(log.with_suffix(f".{n}.log").read_text()[-3000:] for n in range(2))


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    names = (f"neo-{os.getpid()}-0", f"neo-{os.getpid()}-1")
    pair = Machines(names)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{1 + number}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield pair
    finally:
        for number, name in enumerate(names):
            with suppress(subprocess.CalledProcessError):
                pair.kill(number)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, because the quickstart writes into its checkout; with the environment of the tests."""
    checkout = tmp_path_factory.mktemp("two-machines") / "checkout"
    left_out = shutil.ignore_patterns(".*", "out", "tests", "docs", "__pycache__", "shared")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    (checkout / ".venv").symlink_to(Path(sys.prefix).resolve())
    shutil.copytree(ROOT / ".venv-uv", checkout / ".venv-uv", symlinks=True)
    return checkout


@pytest.fixture(scope="module")
def outputs(machines, checkout) -> dict[str, Path]:
    """The quickstart with each layout on two machines, and on one: random starts depend on the layout."""
    outputs = {}
    script = ("bash", checkout / "examples/quickstart/run.sh")
    for layout in LAYOUTS:
        for name in (layout, f"{layout}-alone"):
            log, variables = checkout.parent / f"{name}.log", STEPS | {"LAYOUT": layout}
            if name == layout:
                machines.run(*script, log=log, **variables)
            else:
                with log.open("w") as output:
                    alone = os.environ | variables | {"CUDA_VISIBLE_DEVICES": ""}
                    subprocess.run(script, env=alone, stdout=output, stderr=subprocess.STDOUT, check=True)
            outputs[name] = checkout.parent / name
            shutil.move(checkout / "examples/quickstart/out", outputs[name])
    return outputs


def losses(saved: Path) -> dict[int, float]:
    lines = map(json.loads, (saved / "scalars.jsonl").read_text().splitlines())
    return {line["step"]: line["lm loss"] for line in lines if "lm loss" in line}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_quickstart_is_that_of_one_machine(outputs, layout):
    for run, steps in (("train-shapes", 10), ("train-questions", 20)):
        expected, actual = (losses(outputs[name] / run) for name in (f"{layout}-alone", layout))
        assert max(expected) == steps and actual == pytest.approx(expected, rel=2e-6)
    scores = json.loads((outputs[layout] / "evaluation" / "scores.json").read_text())
    assert "9673" in json.dumps(scores) and (outputs[layout] / "report.html").is_file()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_is_lost_ends_the_other_and_the_job_goes_on(machines, outputs, tmp_path, layout, killed):
    def command(saved: str, port: int, number: int) -> list[str | Path]:
        out = outputs[layout]
        return [
            *(sys.executable, "-m", "neo_megatron.launch", "--nnodes", "2", "--node-rank", str(number)),
            *("--master-addr", "10.77.0.1", "--master-port", str(port), "--nproc-per-node", "1"),
            *("-m", "neo_megatron.pretrain_neo", "--neo-model", out / "model", *LAYOUTS[layout].split()),
            *("--train-data-path", out / "packs" / "shapes", "--seq-length", "256", "--micro-batch-size", "2"),
            *("--global-batch-size", "8", "--num-workers", "0", "--train-iters", str(LAST), "--log-interval", "1"),
            *("--lr", "5e-4", "--min-lr", "5e-5", "--lr-warmup-fraction", "0.05", "--init-method-std", "0.1"),
            *("--save", tmp_path / saved, "--load", tmp_path / saved, "--save-interval", "2"),
        ]

    def start(saved: str, name: str) -> list[subprocess.Popen]:
        machines.port += 1
        return [
            machines.start(
                *(number, *command(saved, machines.port, number)),
                log=tmp_path / f"{name}.{number}.log",
                PYTHONPATH=str(ROOT),
            )
            for number in range(2)
        ]

    def end(nodes: list[subprocess.Popen]) -> list[int]:
        return [node.wait(timeout=10 * MINUTE) for node in nodes]

    assert end(start("without-pause", "whole")) == [0, 0]
    nodes = start("saved", "first")
    while not (tmp_path / "saved" / "scalars.jsonl").exists() or max(losses(tmp_path / "saved"), default=0) < KILLED:
        assert nodes[0].poll() is None, (tmp_path / "first.0.log").read_text()
        time.sleep(0.1)
    machines.kill(killed)
    began = time.monotonic()
    assert nodes[1 - killed].wait(timeout=2 * MINUTE) not in (0, -signal.SIGKILL)
    assert time.monotonic() - began < MINUTE, (tmp_path / f"first.{1 - killed}.log").read_text()
    assert end(start("saved", "second")) == [0, 0], (tmp_path / "second.0.log").read_text()
    assert f"iteration 1/{LAST}" not in (tmp_path / "second.0.log").read_text()
    assert losses(tmp_path / "saved") == pytest.approx(losses(tmp_path / "without-pause"), rel=2e-6)
