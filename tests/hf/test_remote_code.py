"""The exported directory on its own, in transformers 5 and in 4.57, in a process that cannot import this package."""

import json
import os
from pathlib import Path

import pytest
from conftest import run_python

from neo_megatron.model.config import NeoSizes

OLD_TRANSFORMERS = os.environ.get("NEO_TEST_TRANSFORMERS_457")


@pytest.fixture(params=["5", "4.57"])
def environment(request, tmp_path) -> dict[str, str]:
    """What makes a process import one of the two versions."""
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if request.param == "5":
        return {**cache, "EXPECTED_VERSION": "5."}
    if not OLD_TRANSFORMERS:
        pytest.skip("NEO_TEST_TRANSFORMERS_457 names no directory with transformers 4.57 (tests/run.sh makes one)")
    return {**cache, "EXPECTED_VERSION": "4.57.", "PYTHONPATH": OLD_TRANSFORMERS}


def test_loads_and_answers(exported, golden, environment, tmp_path):
    worker = Path(__file__).parent / "remote_code_worker.py"
    done = run_python(worker, exported, golden, tmp_path / "saved", environment=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all is well" in done.stdout
    assert NeoSizes.from_hf_directory(tmp_path / "saved") == NeoSizes.from_hf_directory(exported)


def test_the_directory_is_complete(exported):
    """What serving engines read without running code."""
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("neo_chat", ["NEOChatModel"])
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config["auto_map"].keys()
    assert json.loads((exported / "generation_config.json").read_text()) == {"eos_token_id": 872, "pad_token_id": 870}
    assert {path.name for path in exported.glob("*.py")} >= {
        "configuration_neo.py",
        "modeling_neo.py",
        "processing_neo.py",
    }
    assert not any("neo_megatron" in line for path in exported.glob("*.py") for line in imports(path))


def imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
