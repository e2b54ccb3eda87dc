"""Packs of random documents with images at random places, as the attention rule sees them."""

import torch

from neo_megatron.model.mask import AttentionRule


def random_pack(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pack of documents of 1-40 tokens with images of 1-9 patches at random places, padded at the end."""
    draw = torch.Generator().manual_seed(seed)
    document, image, documents, images = [], [], 0, 0
    while len(document) < length - 16:
        size = int(torch.randint(1, 41, (), generator=draw))
        document += [documents] * size
        patches = min(size, int(torch.randint(0, 10, (), generator=draw)))
        before = int(torch.randint(0, size - patches + 1, (), generator=draw))
        image += [-1] * before + [images] * patches + [-1] * (size - patches - before)
        documents, images = documents + 1, images + 1
    document, image = document[:length], image[:length]
    pad = [-1] * (length - len(document))
    return torch.tensor(document + pad, dtype=torch.int32), torch.tensor(image + pad, dtype=torch.int32)


def random_packs(length: int, count: int) -> AttentionRule:
    """That many of them in a micro-batch."""
    documents, images = zip(*(random_pack(length, seed) for seed in range(count)), strict=True)
    return AttentionRule(torch.stack(documents), torch.stack(images))
