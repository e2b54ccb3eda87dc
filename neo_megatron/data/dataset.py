"""Packs -> tensors. The state of the data set is one integer: item ``i`` depends on (packs, seed, i) alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.draw import permutation
from neo_megatron.data.image import PATCH_VALUES, decode, patches_from_image
from neo_megatron.data.pack_index import PackIndex
from neo_megatron.data.shards import ShardSet, patches_of

LossWeighting = Literal["square", "sample", "token"]
_WEIGHT_POWER: dict[str, float] = {"square": -0.5, "sample": -1.0, "token": 0.0}


class PackDataset(torch.utils.data.Dataset):
    """Packs in a random order, a new one in every epoch.

    Args:
        pack_directory: written by ``tools/pack_data.py``.
        num_samples: number of items; more than there are packs means several epochs.
        seed: of the order; epoch e has the permutation of (seed, e).
        loss_weighting: weight of each of the n trained tokens of a sample: "square" 1/sqrt(n), "sample" 1/n, "token" 1.
        pictures: whether items carry patches; a rank that embeds no picture need not read them.
    """

    def __init__(
        self,
        pack_directory: str | Path,
        num_samples: int,
        seed: int,
        loss_weighting: LossWeighting = "square",
        pictures: bool = True,
    ) -> None:
        self.packs = PackIndex.open(pack_directory)
        self._num_samples = num_samples
        self._seed = seed
        self._power = _WEIGHT_POWER[loss_weighting]
        self._pictures = pictures
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pack of T tokens with M targets and C cells of pictures, as CPU tensors.

        ``tokens`` int64 [T]; ``positions_thw`` int32 [T, 3]; ``document`` and ``image`` int32 [T], numbers within the
        pack, -1 for padding and outside pictures; ``target_index`` int64 [M], positions whose next token is trained;
        ``targets`` int64 [M], those next tokens; ``target_weight`` float32 [M]; ``cell_index`` int64 [C], positions of
        the ``<IMG_CONTEXT>`` tokens; ``patches`` uint8 [C, 4, 768].
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"item {index} of a data set of {self._num_samples}")
        epoch, place = divmod(index, len(self.packs))
        if epoch != self._epoch:  # kept because it is slow to draw; it is no state, any item can be asked for
            self._epoch, self._order = epoch, permutation(len(self.packs), self._seed, "epoch", epoch)
        samples = self.packs[int(self._order[place])].tolist()
        return assemble(self.packs.shards, samples, self.packs.sequence_length, self._power, self._pictures)


def assemble(
    shards: ShardSet, samples: Sequence[int], length: int, weight_power: float, pictures: bool
) -> dict[str, Tensor]:
    """The given samples behind one another, padded to ``length``. See ``PackDataset.__getitem__``."""
    tokens = np.full(length, shards.ids.pad, np.int64)
    document = np.full(length, -1, np.int32)
    trained = np.zeros(length, bool)
    weight = np.zeros(length, np.float32)
    grids: list[np.ndarray] = [np.empty((0, 2), np.int32)]
    patches: list[np.ndarray] = [np.empty((0, 4, PATCH_VALUES), np.uint8)]
    end = 0
    for number, sample in enumerate(samples):
        shard, local = shards.locate(sample)
        sequence = shard.tokens[local]
        start, end = end, end + len(sequence)
        tokens[start:end] = sequence
        document[start:end] = number
        spans = shard.spans[local].reshape(-1, 2)
        for span_start, span_end in spans.tolist():
            trained[start + span_start : start + span_end] = True
        weight[start:end] = float((spans[:, 1] - spans[:, 0]).sum()) ** weight_power
        for picture in shard.picture_range(local):
            grids.append(shard.grids[picture : picture + 1])
            if pictures:
                patches.append(_patches(shards, shard.picture(picture), shard.grids[picture], sample))
    positions, image = native_positions(tokens, document, np.concatenate(grids), shards.ids)
    targets = np.flatnonzero(trained)  # never the first token of a document, which is a turn's header
    cells = np.flatnonzero(image >= 0) if pictures else np.empty(0, np.int64)
    return {
        "tokens": torch.from_numpy(tokens),
        "positions_thw": torch.from_numpy(positions),
        "document": torch.from_numpy(document),
        "image": torch.from_numpy(image),
        "target_index": torch.from_numpy(targets - 1),
        "targets": torch.from_numpy(tokens[targets]),
        "target_weight": torch.from_numpy(weight[targets]),
        "cell_index": torch.from_numpy(cells),
        "patches": torch.from_numpy(np.concatenate(patches)),
    }


def native_positions(
    tokens: np.ndarray, document: np.ndarray, grids: np.ndarray, ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """(t, h, w) int32 [T, 3] and the number of the image int32 [T] of each token of a pack.

    ``t`` counts from 0 in each document: one step for a text token and one for an image as a whole. ``h`` and ``w`` are
    row and column in the merged grid of the image.

    Args:
        tokens, document: [T]; ``document`` is -1 in padding.
        grids: int [images, 2] in patches, in the order of the images.
    """
    real = document >= 0
    context = (tokens == ids.image_context) & real
    starts_image = np.zeros(len(tokens), bool)
    starts_image[1:] = context[1:] & (tokens[:-1] == ids.image_start)
    steps = np.cumsum(~context | starts_image)
    first = np.flatnonzero(np.diff(document, prepend=-1) * real)
    positions = np.zeros((len(tokens), 3), np.int32)
    positions[real, 0] = (steps[real] - steps[first][document[real]]).astype(np.int32)

    image = np.where(context, np.cumsum(starts_image) - 1, -1).astype(np.int32)
    sizes = grids.prod(axis=1) // 4
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = np.repeat(grids[:, 1] // 2, sizes)
    positions[context, 1] = within // columns
    positions[context, 2] = within % columns
    return positions, image


def _patches(shards: ShardSet, stored: np.ndarray, grid: np.ndarray, sample: int) -> np.ndarray:
    if shards.image_store == "patches":
        return patches_of(stored)
    name = f"of sample {sample} in {shards.directory}"
    return patches_from_image(decode(stored.tobytes(), name), (int(grid[0]), int(grid[1])))


def collate(packs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """B packs -> one micro-batch: per-token tensors stacked to [B, T, ...], the others joined end to end.

    ``target_index`` and ``cell_index`` count in the flattened [B * T]; numbers of documents and images stay per pack.
    """
    length = len(packs[0]["tokens"])
    batch = {
        key: torch.stack([pack[key] for pack in packs]) for key in ("tokens", "positions_thw", "document", "image")
    }
    for key in ("target_index", "cell_index"):
        batch[key] = torch.cat([pack[key] + row * length for row, pack in enumerate(packs)])
    for key in ("targets", "target_weight", "patches"):
        batch[key] = torch.cat([pack[key] for pack in packs])
    return batch
