"""Data and starting checkpoints that runs of `pretrain_neo` share."""

import json
from pathlib import Path

import pytest
from conftest import GOLDEN, run_python

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def room(tmp_path_factory) -> Path:
    """Packs of the golden documents, made with the tools, and the golden checkpoint in Megatron's form."""
    room = tmp_path_factory.mktemp("pretrain")
    golden = json.loads((GOLDEN / "meta.json").read_text())
    documents = golden["untied_pack1"]["docs"] + golden["untied_textonly"]["docs"]
    (room / "annotations.json").write_text(json.dumps(documents * 8))
    for command in (
        f"preprocess_data.py --input {room}/annotations.json --image-root {GOLDEN} --tokenizer {GOLDEN}/tokenizer "
        f"--output {room}/shards --min-pixels 4096 --max-pixels 65536 --workers 1",
        f"pack_data.py --data {room}/shards --output {room}/packs --seq-length 192",
    ):
        tool, *arguments = command.split()
        done = run_python(TOOLS / tool, *arguments)
        assert done.returncode == 0, done.stdout
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    return room
