"""The Transformer Engine layers stand for the local ones: same names in a checkpoint, same stages, same gradients."""

import importlib.util
import os
from pathlib import Path

import pytest
from support.paths import ROOT
from support.processes import torchrun

from neo_megatron.model import layer_specs


def test_transformer_engine_layers_match_the_local_ones():
    directory = os.environ.get("NEO_TEST_TRANSFORMER_ENGINE", "")
    if not directory and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip(
            "Transformer Engine is not installed; NEO_TEST_TRANSFORMER_ENGINE may name a directory that holds it"
        )
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT / "tests"), directory)))
    done = torchrun(2, Path(__file__).parent / "te_worker.py", environment={"PYTHONPATH": path})
    assert "same names, shapes, losses and gradients" in done


def test_without_transformer_engine_one_sentence_says_what_to_do(monkeypatch, build):
    config = build().config
    monkeypatch.setattr(layer_specs, "HAVE_TE", False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'transformer-engine\[pytorch\]==2\.20\.\*'"):
        layer_specs.transformer_engine_layer_spec(config)
