"""The Transformer Engine layers stand for the local ones: same parameters, same names in a checkpoint, same stages."""

import importlib.util
import os
from pathlib import Path

import pytest
from conftest import run_python

from neo_megatron.model import layer_specs


def test_transformer_engine_layers_match_the_local_ones():
    directory = os.environ.get("NEO_TEST_TRANSFORMER_ENGINE", "")
    if not directory and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip(
            "Transformer Engine is not installed; NEO_TEST_TRANSFORMER_ENGINE may name a directory that holds it"
        )
    done = run_python(Path(__file__).parent / "te_worker.py", environment={"PYTHONPATH": directory})
    assert done.returncode == 0 and "same names, shapes and stages" in done.stdout, done.stdout[-3000:]


def test_without_transformer_engine_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(layer_specs, "HAVE_TE", False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'neo-megatron\[te\]'"):
        layer_specs.transformer_engine_layer_spec()
