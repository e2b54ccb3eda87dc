"""A short training with three checkpoints, and questions to follow it with."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.golden_packs import make_packs
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.cli import follow as command

STEPS = (2, 4, 6)
SETS = ("seen", "read")


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        saved: its --save.
        events, mlflow: directories of its trackers.
        registry: of the two data sets to evaluate with.
    """

    saved: Path
    events: Path
    mlflow: Path
    registry: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    room = tmp_path_factory.mktemp("followed")
    make_packs(room, repeats=4, seq_length=192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    words = [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--pretrained-checkpoint", f"{room}/golden"),
        *("--train-data-path", f"{room}/packs", "--micro-batch-size", "1", "--global-batch-size", "2"),
        *("--train-iters", str(STEPS[-1]), "--save-interval", "2", "--save", f"{room}/saved", "--num-workers", "0"),
        *("--lr", "1e-2", "--min-lr", "1e-5", "--lr-warmup-iters", "0", "--log-interval", "1"),
    ]
    if find_spec("mlflow"):
        words += ["--mlflow-dir", f"{room}/mlflow"]
    job = Job(room / "job", words)
    run_jobs(1, [job])
    assert job.exit() is None
    names = {"seen": ["a.png", "b.png", None], "read": ["c.png", None]}
    for data_set, images in names.items():
        records = [
            {
                **({"image": name} if name else {}),
                "conversations": [
                    {"from": "human", "value": f"{'<image>' if name else ''}What is {number}?"},
                    {"from": "gpt", "value": f"It is {number}."},
                ],
            }
            for number, name in enumerate(images)
        ]
        (room / f"{data_set}.json").write_text(json.dumps(records))
    entries = {name: {"annotation_path": f"{name}.json", "data_path": str(GOLDEN / "images")} for name in SETS}
    (room / "registry.yaml").write_text(json.dumps(entries))
    return Trained(room / "saved", job.directory / "events", room / "mlflow", room / "registry.yaml")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run's directory, whose TensorBoard has no scores yet."""
    shutil.rmtree(trained.events / "scores", ignore_errors=True)
    return shutil.copytree(trained.saved, tmp_path / "run")


@pytest.fixture(scope="session")
def follow(trained) -> Callable[..., None]:
    """Runs the command in this process."""

    def of(run: Path, output: Path, *further: str, once: bool = True) -> None:
        flags = ["--output", output, "--tokenizer", GOLDEN / "tokenizer", "--registry", trained.registry]
        flags += ["--datasets", *SETS, "--max-new-tokens", 3, "--workers", 1, *(["--once"] if once else [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["follow.py", str(run), *map(str, flags), *further])
            command.main()

    return of
