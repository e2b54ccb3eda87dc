"""The golden packs as arguments of the transformers model, and packs of their documents made with the tools."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.paths import GOLDEN, TOOLS
from support.processes import run_forked


def make_packs(room: Path, repeats: int, seq_length: int) -> Path:
    """Shards and packs in ``room``, of so many copies of the golden documents; gives the directory of packs."""
    golden = json.loads((GOLDEN / "meta.json").read_text())
    documents = golden["untied_pack1"]["docs"] + golden["untied_textonly"]["docs"]
    (room / "annotations.json").write_text(json.dumps(documents * repeats))
    for command in (
        f"preprocess_data.py --input {room}/annotations.json --image-root {GOLDEN} --tokenizer {GOLDEN}/tokenizer "
        f"--output {room}/shards --min-pixels 4096 --max-pixels 65536 --workers 1",
        f"pack_data.py --data {room}/shards --output {room}/packs --seq-length {seq_length}",
    ):
        tool, *arguments = command.split()
        done = run_forked(TOOLS / tool, *arguments)
        assert done.returncode == 0, done.stdout
    return room / "packs"


def load(golden: Path, kind: str, name: str) -> dict[str, Tensor]:
    return load_file(golden / f"{kind}_{name}.safetensors")


def packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pack as arguments of `forward`: several documents need a mask and positions of their own."""
    arguments = {
        "input_ids": inputs["input_ids"],
        "positions_thw": inputs["positions_thw"][None],
        "attention_mask": inputs["attention_mask_dense"][None, None],
        "labels": inputs["labels"][None],
    }
    return arguments | {key: inputs[key] for key in ("pixel_values", "grid_hw") if key in inputs}


def flattened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pack as `DataCollatorWithFlattening` of transformers has it: all else follows from where documents begin."""
    lengths = inputs["seq_boundaries"].diff().tolist()
    arguments = packed(inputs)
    del arguments["positions_thw"], arguments["attention_mask"]
    return arguments | {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
