"""The Python of docs/checkpoints.md runs as it stands there, on an exported directory."""

import re
import shutil

import pytest
from support.paths import ROOT
from support.processes import run_python

pytest.importorskip("accelerate", reason="accelerate is missing, which device_map asks for")

PAGE = ROOT / "docs" / "checkpoints.md"


def test_python_of_the_page(exported, golden, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    (tmp_path / "neo-trained").symlink_to(exported)
    shutil.copy(golden / "images" / "a.png", tmp_path / "cat.png")
    said = "print('answered:', answer, len(history))"
    (tmp_path / "page.py").write_text("\n".join([*blocks, said]))
    monkeypatch.chdir(tmp_path)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = run_python("page.py", environment=environment)
    assert done.returncode == 0 and "answered:" in done.stdout, done.stdout[-4000:]


def test_files_of_the_page(exported):
    """Every file of the directory is in the table."""
    table = PAGE.read_text().split("## transformers")[0]
    assert [path.name for path in exported.iterdir() if f"`{path.name}`" not in table] == []
