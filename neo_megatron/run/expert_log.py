"""Figures of the routers of a mixture of experts for the log, by layer and modality.

============================  =====================================================================================
`experts/load imbalance/...`  tokens of the busiest expert over the mean of all; 1 is even
`experts/router entropy/...`  of the probabilities over all experts, over the largest that is possible; 1 is undecided
`experts/dead experts/...`    share of experts that no token went to
`experts/balance loss/...`    of SenseNova-U1 (see `model/expert_router.py`), whether it is trained on or not
============================  =====================================================================================

They are of all training tokens of all ranks since they were last written. Tags go on with `text` or `image`, and
`layer 07`; without a layer they are the mean over layers, or for the loss the sum.
"""

import math

from torch import Tensor

from neo_megatron.model.expert_router import MODALITIES, ExpertRouter, balance_of
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.run.ranks import sums_of_layers


class ExpertLog:
    """Collects the figures of all layers on every rank; does nothing for a dense model."""

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._routers: dict[int, ExpertRouter] = {}
        self._means: dict[str, float] = {}

    def watch(self, model: NeoModel) -> None:
        """Adds the routers of a model chunk of this rank."""
        if self._experts:
            self._routers |= {layer.layer_number - 1: layer.mlp.router for layer in model.decoder.layers}

    def gather(self) -> dict[str, float]:
        """The scalars since the last call; all ranks must call it."""
        if not self._experts:
            return {}
        counted = {number: router.counted for number, router in self._routers.items()}
        for router in self._routers.values():
            router.counted = None
        sums = sums_of_layers(counted, self._layers, 2, 2 * self._experts + 2)
        scalars: dict[str, float] = {}
        for name, figures in balance_of(sums, self._experts).items():
            for modality, of_layers in zip(MODALITIES, figures.unbind(dim=1), strict=True):
                scalars |= _scalars(f"experts/{name}/{modality}", of_layers, name == "balance loss")
        self._means = {tag: value for tag, value in scalars.items() if " layer " not in tag}
        return scalars

    @property
    def line(self) -> list[str]:
        """Figures of the last call for a line of the log."""
        load = {name: self._means.get(f"experts/load imbalance/{name}") for name in MODALITIES}
        text = ", ".join(f"{name} {value:.2f}" for name, value in load.items() if value is not None)
        return [f"expert load imbalance: {text}"] if text else []


def _scalars(tag: str, of_layers: Tensor, is_sum: bool) -> dict[str, float]:
    """Of each layer and of all; none where a modality had no tokens."""
    values = of_layers.tolist()
    if any(math.isnan(value) for value in values):
        return {}
    scalars = {f"{tag} layer {number:02d}": value for number, value in enumerate(values)}
    return scalars | {tag: sum(values) if is_sum else sum(values) / len(values)}
