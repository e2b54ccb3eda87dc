"""The models of the reference numbers: where the files of each are, and what they hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.model.config import NeoSizes
from support.paths import GOLDEN


@dataclass(frozen=True)
class GoldenModel:
    """One model.

    Args:
        directory: of the files with numbers.
        checkpoint: in Hugging Face form.
        name: in the names of the files.
        gradients_of: the weighting of the loss whose gradients are stored.
        losses: weighting -> key in `meta.json`.
    """

    directory: Path
    checkpoint: Path
    name: str
    gradients_of: str
    losses: dict[str, str]

    @property
    def sizes(self) -> NeoSizes:
        """Files of a NEO-unify do not tell the pre-buffer apart: it is taken to have two layers, as NEO 1.0's has."""
        sizes = read_sizes(self.checkpoint)
        return sizes.replace(pre_buffer_layers=2, post_llm_layers=sizes.num_layers - 2)

    def outputs(self, pack: str) -> dict[str, Tensor]:
        return load_file(self.directory / f"outputs_{self.name}_{pack}.safetensors")

    def gradients(self) -> dict[str, Tensor]:
        """Of the loss of pack1, by published names."""
        return load_file(self.directory / f"grads_{self.name}_pack1.safetensors")

    def meta(self, pack: str) -> dict[str, Any]:
        return json.loads((self.directory / "meta.json").read_text())[f"{self.name}_{pack}"]

    def loss(self, pack: str, weighting: str) -> float:
        return self.meta(pack)[self.losses[weighting]]


_UNIFY_LOSSES = {weighting: f"loss_{weighting}" for weighting in ("token", "sample", "square")}
MODELS = {
    "neo": GoldenModel(GOLDEN, GOLDEN / "ckpt_untied", "untied", "square", {**_UNIFY_LOSSES, "square": "loss"}),
    "u1-dense": GoldenModel(GOLDEN / "u1", GOLDEN / "u1" / "dense", "dense", "token", _UNIFY_LOSSES),
    "u1-moe": GoldenModel(GOLDEN / "u1", GOLDEN / "u1" / "moe", "moe", "token", _UNIFY_LOSSES),
}
