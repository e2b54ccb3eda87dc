"""The golden packs as arguments of the transformers model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


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
