"""Functions that a GPU compiles are compiled once, and never run uncompiled."""

from pathlib import Path

import pytest
from support.processes import run_python

from neo_megatron.errors import ConfigError
from neo_megatron.model.compiled import compiled


def test_other_packs_cause_no_recompilation_and_too_many_shapes_fail():
    done = run_python(Path(__file__).parent / "compile_worker.py", environment={"TORCHDYNAMO_DISABLE": "0"})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "one graph" in done.stdout and "never uncompiled" in done.stdout


def test_switched_off_it_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ConfigError, match="TORCHDYNAMO_DISABLE=1: uncompiled, attention on a GPU"):
        compiled(len)
