"""Data and starting checkpoints that runs of `pretrain_neo` share."""

from pathlib import Path

import pytest
from support.golden_packs import make_packs
from support.paths import GOLDEN

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron


@pytest.fixture(scope="session")
def room(tmp_path_factory) -> Path:
    """Packs of the golden documents, made with the tools, and the golden checkpoint in Megatron's form."""
    room = tmp_path_factory.mktemp("pretrain")
    make_packs(room, repeats=8, seq_length=192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    return room
