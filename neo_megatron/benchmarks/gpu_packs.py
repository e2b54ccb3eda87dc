"""Packs of the length mix, in memory: as a rank's loader returns them, and as inputs of the exported model.

Tokens and pixels are random, since no kernel's time depends on them; lengths, images and trained tokens are those of
the mix.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from neo_megatron.benchmarks.lengths import Sample, draw_samples
from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.dataset import collate, pack_tensors
from neo_megatron.data.image import IMAGE_MEAN, IMAGE_STD, PATCH_VALUES
from neo_megatron.data.packs.best_fit import best_fit
from neo_megatron.model.config import NeoSizes

POOL = 2048
# Of a sample's text: its answers.
TRAINED_SHARE = 2 / 3


def draw_packs(sizes: NeoSizes, length: int, count: int, seed: int, shrunk: int = 1) -> list[dict[str, Any]]:
    """Micro-batches of one pack each, as `neo_megatron.data.dataset.collate` gives them.

    Args:
        shrunk: divides texts and the sides of images, for tiny models on a CPU.
    """
    random = np.random.default_rng(seed)
    samples = [sample.shrunk(shrunk) for sample in draw_samples(POOL, seed)]
    of_length: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.tokens <= length:
            of_length.setdefault(sample.tokens, []).append(sample)
    histogram = np.bincount([tokens for tokens, alike in of_length.items() for _ in alike], minlength=length + 1)
    filled = [pattern.runs for pattern in best_fit(histogram) for _ in range(pattern.packs)]
    packs = [[of_length[tokens].pop() for tokens, times in runs for _ in range(times)] for runs in filled]
    # The last packs are not full.
    full = [pack for pack in packs if sum(sample.tokens for sample in pack) > 0.95 * length]
    return [collate([_item(sizes, full[place], length, random)]) for place in random.permutation(len(full))[:count]]


def plain_inputs(pack: dict[str, Any]) -> dict[str, Tensor]:
    """A pack as arguments of the exported model: documents begin where ``position_ids`` are 0."""
    tokens, document, image_index = pack["tokens"], pack["document"][0], pack["image_token_index"]
    starts = torch.nonzero(document.diff(prepend=document.new_tensor([-2]))).flatten()
    place = torch.arange(len(document))
    labels, weight = torch.full_like(tokens, -100), torch.zeros(tokens.shape)
    labels[0, pack["target_index"] + 1] = pack["targets"]
    weight[0, pack["target_index"] + 1] = pack["target_weight"]
    rows, grids = [], []
    pixels = _normalised(pack["patches"])
    for image in pack["image"][0, image_index].unique():
        here = pack["image"][0, image_index] == image
        height, width = (pack["positions_thw"][0, image_index[here], 1:].amax(dim=0) + 1).tolist()
        rows.append(pixels[here].view(height, width, 2, 2, -1).transpose(1, 2).reshape(-1, PATCH_VALUES))
        grids.append((2 * height, 2 * width))
    inputs = {
        "input_ids": tokens,
        "position_ids": (place - starts[torch.searchsorted(starts, place, right=True) - 1])[None],
        "labels": labels,
        "loss_weight": weight,
    }
    return inputs | ({"pixel_values": torch.cat(rows), "grid_hw": torch.tensor(grids)} if rows else {})


def _item(sizes: NeoSizes, samples: list[Sample], length: int, random: np.random.Generator) -> dict[str, Any]:
    """The pack that `PackDataset` would give for these samples."""
    ids = SpecialIds(sizes.image_context_token_id, sizes.image_start_token_id, *[0] * 4)
    # Below the control tokens, which come after the tokens of text.
    pixels = random.integers(0, 256, (64, 4, PATCH_VALUES), np.uint8)  # repeated: drawing all takes seconds
    tokens = random.integers(1, min(ids.image_context, ids.image_start), length)
    document, weight = np.full(length, -1, np.int32), np.zeros(length, np.float32)
    start = 0
    for number, sample in enumerate(samples):
        end, place = start + sample.tokens, start + 4  # after a turn's header
        document[start:end] = number
        for rows, columns in sample.grids:
            tokens[place] = ids.image_start
            tokens[place + 1 : place + 1 + rows * columns] = ids.image_context
            place += rows * columns + 2
        answer = max(round(TRAINED_SHARE * sample.text), 1)
        weight[end - answer : end] = answer**-0.5
        start = end
    tokens[start:] = 0
    grids = np.array([grid for sample in samples for grid in sample.grids], np.int64).reshape(-1, 2)
    targets, patch_count = np.flatnonzero(weight), int(grids.prod(axis=1).sum())
    patches = np.resize(pixels, (patch_count, 4, PATCH_VALUES))
    tensors = pack_tensors(tokens, document, 2 * grids, ids, targets, weight[targets], patches)
    group = torch.zeros(len(targets), dtype=torch.int32)
    return {**tensors, "target_group": group, "samples": len(samples), "broken": []}


def _normalised(patches: Tensor) -> Tensor:
    mean, std = torch.tensor(IMAGE_MEAN)[:, None], torch.tensor(IMAGE_STD)[:, None]
    return ((patches.unflatten(-1, (3, -1)) / 255 - mean) / std).flatten(2)
