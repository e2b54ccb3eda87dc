"""The exported directory on its own, in several versions of transformers, in a process without this package."""

import json
import os
import re
from pathlib import Path

import pytest
import transformers
from support.processes import run_python

from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.checkpoint.to_hf import AUTO_MAP, PROCESSOR_MAP


@pytest.fixture(params=["environment", "5.23", "4.57"])
def environment(request, tmp_path) -> dict[str, str]:
    """The settings by which a process imports one of the versions."""
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if request.param == "environment":
        return {**cache, "EXPECTED_VERSION": transformers.__version__}
    name = f"NEO_TEST_TRANSFORMERS_{request.param.replace('.', '')}"
    directory = os.environ.get(name)
    if not directory:
        pytest.skip(f"{name} names no directory with transformers {request.param} (tests/run.sh makes one)")
    return {**cache, "EXPECTED_VERSION": f"{request.param}.", "PYTHONPATH": directory}


def test_loads_and_answers(exported, golden, environment, tmp_path):
    worker = Path(__file__).parent / "remote_code_worker.py"
    done = run_python(worker, exported, golden, tmp_path / "saved", environment=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all is well" in done.stdout
    assert read_sizes(tmp_path / "saved") == read_sizes(exported)


def test_the_directory_is_complete(exported):
    """The files that serving engines read without running code."""
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


def test_every_entry_names_all_files_that_it_needs(exported):
    """Some versions of transformers copy the files that an entry of `auto_map` imports, and not what those import."""
    entries = {name.split(".")[0] for settings in (AUTO_MAP, PROCESSOR_MAP) for name in settings.values()}
    assert entries == {"configuration_neo", "modeling_neo", "processing_neo", "image_processing_neo"}
    for entry in entries:
        named = siblings(exported / f"{entry}.py")
        needed = {name for other in named for name in siblings(exported / f"{other}.py")}
        assert needed - {entry} <= named, f"{entry}.py must import {sorted(needed - named)}, too"


def siblings(path: Path) -> set[str]:
    return set(re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE))


def imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
