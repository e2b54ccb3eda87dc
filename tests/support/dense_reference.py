"""Packs through the exported model's code in float64, every document by itself: the reference of what a run logs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_megatron.data.dataset import collate
from neo_megatron.hf.modeling_neo import NEOChatModel
from neo_megatron.parity.pack import MadePack, left_padded


class DenseReference:
    """A model of `layout_runs.write_random_model`."""

    def __init__(self, directory: Path) -> None:
        self.model = NEOChatModel.from_pretrained(directory, attn_implementation="eager").double().eval()

    def losses(self, item: dict[str, Any]) -> Tensor:
        """Cross entropy float64 ``[M]`` of the trained positions of an item of `PackDataset`."""
        return self.run(item)[0]

    def run(self, item: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The losses, and of each layer the attention ``[heads, M, T]`` that the rows of trained positions give."""
        document, length = item["document"], int((item["document"] >= 0).sum())
        ends = (document[:length].diff().nonzero().flatten() + 1).tolist() + [length]
        pack = MadePack(collate([item]), ends, grids_of(item))
        tokens = item["tokens"]
        inputs = {
            "input_ids": left_padded(pack.documents(tokens), 0),
            "attention_mask": left_padded(pack.documents(torch.ones_like(tokens)), 0),
        }
        if len(pack.grids):
            pixels = pack.for_transformers()["pixel_values"].double()
            inputs |= {"pixel_values": pixels, "grid_hw": pack.grids}
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            output = self.model(**inputs, use_cache=False, output_attentions=True)
        logits = output.logits[real][item["target_index"]]
        losses = torch.nn.functional.cross_entropy(logits, item["targets"], reduction="none")
        rows = real.nonzero()[item["target_index"]]  # row of the batch, place in it
        attention = []
        for weights in output.attentions:
            of_rows = torch.zeros(weights.shape[1], len(rows), len(document), dtype=torch.float64)
            for number, (row, place) in enumerate(rows.tolist()):
                keys = slice(ends[row - 1] if row else 0, ends[row])
                of_rows[:, number, keys] = weights[row, :, place, real[row]]
            attention.append(of_rows)
        return losses, attention


def grids_of(item: dict[str, Any]) -> Tensor:
    """Rows and columns of patches of each image, int64 ``[images, 2]``."""
    image, places = item["image"], item["positions_thw"][:, 1:]
    numbers = range(int(image.max()) + 1)
    grids = [2 * (places[image == number].amax(dim=0) + 1) for number in numbers]
    return torch.stack(grids).long() if grids else torch.empty(0, 2, dtype=torch.int64)
