"""Whether the model looks at its images: the figures of an evaluation, see `image_views.py` and `image_attention.py`.

===============================  ===================================================================================
`looking/delta-permuted`         rise of the loss with images of other samples, relative
`looking/delta-blank`            the same with blank images
`looking/without partner`        share of the samples with images of which no image found a partner
`looking/image attention`        share of attention that trained positions of samples with images give to image
                                 tokens, mean over heads and layers; with `layer 07` of one layer
===============================  ===================================================================================

Tags go on with the split.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state

from neo_megatron.model.native_attention import NativeSelfAttention
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.run.image_views import VIEWS
from neo_megatron.run.loss_sums import Losses, LossSums
from neo_megatron.run.ranks import sums_of_layers


class LookingLog:
    """Collects the figures of an evaluation on every rank.

    Attributes:
        losses: by view, and within it samples without an exchanged image and those with one.
    """

    def __init__(self, layers: int) -> None:
        self.losses = LossSums(2 * len(VIEWS))
        self._layers = layers
        self._attentions: dict[int, NativeSelfAttention] = {}
        self._with_images = self._without_partner = 0

    def watch(self, model: NeoModel) -> None:
        """Adds the layers of a model chunk of this rank."""
        self._attentions |= {layer.layer_number - 1: layer.self_attention for layer in model.decoder.layers}

    def note(self, packs: dict[str, Any]) -> None:
        """Counts the samples of a micro-batch of `ViewedBatches`."""
        self._with_images += packs.get("samples_with_images", 0)
        self._without_partner += packs.get("without_partner", 0)

    def gather(self) -> "Looking":
        """The figures since the last call; all ranks must call it."""
        views = self.losses.reduce()
        counts = torch.tensor([self._with_images, self._without_partner], dtype=torch.float64, device="cuda")
        self._with_images = self._without_partner = 0
        # Context-parallel ranks count the same samples.
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        return Looking(views, counts.tolist(), self._image_attention())

    def _image_attention(self) -> list[float]:
        """Of each layer; not a number where no row was measured."""
        measured = {number: attention.image_attention for number, attention in self._attentions.items()}
        for attention in self._attentions.values():
            attention.image_attention = None
        sums = sums_of_layers(measured, self._layers, 2)
        total, count = sums.unbind(dim=1)
        return (total / count).tolist()


class Looking:
    """The figures of one evaluation.

    Attributes:
        losses: of the own images.

    Args:
        views: see `LookingLog.losses`.
        counts: samples with images, and those of them without a partner.
        image_attention: of each layer.
    """

    def __init__(self, views: list[Losses], counts: list[float], image_attention: list[float]) -> None:
        (own_alone, own_exchanged), (_, permuted), blank = zip(views[::2], views[1::2], strict=True)
        self.losses = own_alone + own_exchanged
        self._with_images, self._without_partner = counts
        self._image_attention = image_attention
        self._deltas = {
            "delta-permuted": _rise(own_exchanged, permuted),
            "delta-blank": _rise(self.losses, blank[0] + blank[1]),
        }

    def scalars(self, split: str) -> dict[str, float]:
        """By tag; without what the evaluation had no packs for."""
        figures = dict(self._deltas)
        if self._with_images:
            figures["without partner"] = self._without_partner / self._with_images
        if self._image_attention:
            figures["image attention"] = sum(self._image_attention) / len(self._image_attention)
        figures |= {f"image attention layer {number:02d}": share for number, share in enumerate(self._image_attention)}
        return {f"looking/{name} {split}": value for name, value in figures.items() if not math.isnan(value)}

    def line(self) -> list[str]:
        """For a line of the log; none without images."""
        shown = [f"{name} {value:+.4f}" for name, value in self._deltas.items() if not math.isnan(value)]
        if self._with_images:
            without, samples = round(self._without_partner), round(self._with_images)
            shown.append(f"{without} of {samples} samples with images without a partner")
        return [", ".join(shown)] if shown else []


def _rise(before: Losses, after: Losses) -> float:
    """Of the loss of samples with images, relative; not a number without any."""
    loss = before.with_images
    return (after.with_images - loss) / loss if loss else math.nan
