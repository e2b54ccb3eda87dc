"""Whatever was done to a checkpoint, a tool reads it or ends in one sentence that names the file."""

import json
import shutil
from pathlib import Path

import pytest
from support.paths import ROOT
from support.processes import run_python

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron

WORKER = Path(__file__).parent / "mutation_worker.py"


@pytest.fixture(scope="module")
def hf(checkpoint, tmp_path_factory) -> Path:
    """The golden model with all the files that a published one has."""
    directory = tmp_path_factory.mktemp("published") / "neo"
    shutil.copytree(checkpoint, directory)
    settings = {"eos_token_id": 872, "pad_token_id": 870, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def megatron(hf, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "megatron"
    convert_hf_to_megatron(hf, directory)
    (directory / "release" / "checksums.json").unlink()  # those of other programs have none, and it hides what is wrong
    return directory


def check(form: str, checkpoint: Path, hf: Path, scratch: Path, every: int, least: int) -> None:
    done = run_python(WORKER, form, checkpoint, hf, scratch / "mutation", every, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tried"] >= least
    assert not result["failed"], f"{len(result['failed'])} of {result['tried']}:\n" + "\n".join(result["failed"])


def test_a_sample_of_hugging_face_mutations(hf, tmp_path):
    check("hf", hf, hf, tmp_path, 80, 20)


def test_a_sample_of_torch_dist_mutations(megatron, hf, tmp_path):
    check("torch_dist", megatron, hf, tmp_path, 25, 6)


@pytest.mark.thorough
def test_every_hugging_face_mutation(hf, tmp_path):
    check("hf", hf, hf, tmp_path, 1, 247)


@pytest.mark.thorough
def test_every_torch_dist_mutation(megatron, hf, tmp_path):
    check("torch_dist", megatron, hf, tmp_path, 1, 152)
