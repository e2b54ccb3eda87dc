"""A pack of documents with images, made up from a seed, in the form that each of the two models takes.

Megatron's gets it as training does: documents one after another, positions and mask spelled out. transformers' gets
each document as a user calls it, from which it derives positions and mask itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.dataset import collate, pack_tensors
from neo_megatron.data.image import PATCH_VALUES, image_tokens, normalise
from neo_megatron.model.config import NeoSizes

# The grids of each document's images, in patches: text alone, one image, two of different shapes.
DOCUMENTS: tuple[tuple[tuple[int, int], ...], ...] = ((), ((4, 6),), ((8, 2), (2, 4)))
TEXT_TOKENS = 12  # after every image, and in front of the first
PADDING = 3


@dataclass(frozen=True)
class MadePack:
    """A pack as `neo_megatron.data.dataset` would give it, with the bounds of its documents and images."""

    packed: dict[str, Tensor]
    ends: list[int]
    grids: Tensor

    @property
    def length(self) -> int:
        """Tokens without padding."""
        return self.ends[-1]

    def documents(self, of_tokens: Tensor) -> list[Tensor]:
        """The parts of ``[T, ...]`` that belong to each document."""
        starts = [0, *self.ends[:-1]]
        return [of_tokens[start:end] for start, end in zip(starts, self.ends, strict=True)]

    def for_transformers(self) -> dict[str, Tensor]:
        """Arguments of the exported model's `forward`: a row for each document, padded on the left."""
        packed = self.packed
        tokens = packed["tokens"][0]
        labels, weight = torch.full_like(tokens, -100), torch.zeros(len(tokens))
        labels[packed["target_index"] + 1] = packed["targets"]
        weight[packed["target_index"] + 1] = packed["target_weight"]
        return {
            "input_ids": left_padded(self.documents(tokens), 0),
            "attention_mask": left_padded(self.documents(torch.ones_like(tokens)), 0),
            "labels": left_padded(self.documents(labels), -100),
            "loss_weight": left_padded(self.documents(weight), 0),
            "pixel_values": self._pixel_values(),
            "grid_hw": self.grids,
        }

    def _pixel_values(self) -> Tensor:
        """Patches in blocks of 2x2 -> normalised patches ``[P, 768]``, row by row of each image."""
        normalised = torch.from_numpy(normalise(self.packed["patches"].numpy()))
        images = normalised.split(image_tokens(self.grids.numpy()).tolist())
        row_major = [
            image.view(h // 2, w // 2, 2, 2, PATCH_VALUES).transpose(1, 2).reshape(h * w, PATCH_VALUES)
            for image, (h, w) in zip(images, self.grids.tolist(), strict=True)
        ]
        return torch.cat(row_major)


def left_padded(rows: list[Tensor], value: int) -> Tensor:
    """Rows of different lengths -> ``[rows, longest]``, filled with ``value`` on the left."""
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])


def made_pack(sizes: NeoSizes, seed: int = 0) -> MadePack:
    """Random words and pixels. The last words of every document are trained on."""
    draw = np.random.default_rng(seed)
    start, context = sizes.image_start_token_id, sizes.image_context_token_id
    words = np.setdiff1d(np.arange(sizes.vocab_size), [start, context])
    tokens, trained, ends = [], [], []
    for grids in DOCUMENTS:
        tokens += draw.choice(words, TEXT_TOKENS).tolist()
        for count in image_tokens(np.array(grids, np.int64).reshape(-1, 2)).tolist():
            tokens += [start, *[context] * count, *draw.choice(words, TEXT_TOKENS).tolist()]
        ends.append(len(tokens))
        trained.append(np.arange(len(tokens) - TEXT_TOKENS // 2, len(tokens)))
    document = np.repeat(np.arange(len(ends), dtype=np.int32), np.diff(ends, prepend=0))
    tokens_T = np.array(tokens + [0] * PADDING)
    document_T = np.append(document, np.full(PADDING, -1, np.int32))
    every_grid = np.array([grid for document in DOCUMENTS for grid in document])
    ids = SpecialIds(context, start, image_end=-1, turn_start=-1, turn_end=-1, pad=0)
    targets = np.concatenate(trained)
    weight = np.concatenate([np.full(len(part), len(part) ** -0.5, np.float32) for part in trained])
    patches = draw.integers(0, 256, (image_tokens(every_grid).sum(), 4, PATCH_VALUES), np.uint8)
    tensors = pack_tensors(tokens_T, document_T, every_grid, ids, targets, weight, patches)
    packed = collate([{**tensors, "samples": len(ends), "broken": []}])
    return MadePack({name: packed[name] for name in tensors}, ends, torch.from_numpy(every_grid))
