"""Checks that stored samples can be trained on: one sample with a message, or all of a pack fast."""

from collections.abc import Sequence

import numpy as np

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.image import image_tokens
from neo_megatron.data.shards.reader import StoredSample, check_grids


def wrong_tokens(tokens: np.ndarray, grids: np.ndarray | None, ids: SpecialIds, vocabulary: int) -> str:
    """Says what is wrong with the tokens of a sample; "" for nothing.

    Args:
        tokens: int [n].
        grids: int32 [p, 2] of its images, even and positive; ``None`` if unknown.
        ids: of the control tokens.
        vocabulary: number of tokens of the tokenizer.
    """
    if not len(tokens):
        return "it has no tokens"
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        return f"it has the token {low if low < 0 else high}, outside the {vocabulary:,} of the tokenizer"
    if grids is None:
        return ""
    starts = np.flatnonzero(tokens == ids.image_start)
    if len(starts) != len(grids):
        return f"it has {len(starts)} <img> tokens for {len(grids)} images"
    if not _images_in_place(tokens, starts, grids, ids):
        return "its <IMG_CONTEXT> tokens are not those of its images"
    return ""


def wrong_spans(spans: np.ndarray, length: int, trained: int | None = None) -> str:
    """Says what is wrong with the trained ranges of a sample; "" for nothing.

    Args:
        spans: int32 [2 k], ``start, end, start, end, ...``.
        length: tokens of the sample.
        trained: number of trained tokens according to its row, if known.
    """
    if len(spans) < 2:
        return "it has no trained tokens"
    if len(spans) % 2 or spans[0] < 1 or spans[-1] > length or (spans[1:] <= spans[:-1]).any():
        return "its trained ranges do not lie within the sample in ascending order"
    if trained is not None and int((spans[1::2] - spans[::2]).sum()) != trained:
        return f"its trained ranges do not have the {trained} tokens that samples.npy says"
    return ""


def are_sound(samples: Sequence[StoredSample], tokens: np.ndarray, ids: SpecialIds, vocabulary: int) -> bool:
    """Whether the samples of a pack are sound; images are not checked.

    Args:
        samples: of the pack.
        tokens: int [n], of all samples, one sample after another.
        ids: of the control tokens.
        vocabulary: number of tokens of the tokenizer.
    """
    lengths = np.array([len(sample.tokens) for sample in samples])
    if not lengths.all() or tokens.min() < 0 or tokens.max() >= vocabulary:
        return False
    if not all(len(sample.spans) for sample in samples):
        return False
    ends = np.cumsum(lengths)
    spans = np.concatenate([sample.spans for sample in samples]).reshape(-1).astype(np.int64)
    owners = np.repeat(np.arange(len(samples)), [sample.spans.size for sample in samples])
    if (spans < 1).any() or (spans > lengths[owners]).any():
        return False
    if (np.diff(spans + (ends - lengths)[owners]) <= 0).any():  # from one sample to the next they ascend by themselves
        return False
    grids = np.concatenate([sample.grids for sample in samples])
    starts = np.flatnonzero(tokens == ids.image_start)
    found = np.diff(np.searchsorted(starts, ends), prepend=0)
    if check_grids(grids) or found.tolist() != [len(sample.grids) for sample in samples]:
        return False
    return _images_in_place(tokens, starts, grids, ids)


def what_is_wrong(sample: StoredSample, ids: SpecialIds, vocabulary: int) -> str:
    """Says what `are_sound` found, if it is in this sample."""
    return (
        check_grids(sample.grids)
        or wrong_tokens(sample.tokens, sample.grids, ids, vocabulary)
        or wrong_spans(sample.spans.reshape(-1), len(sample.tokens))
    )


def _images_in_place(tokens: np.ndarray, starts: np.ndarray, grids: np.ndarray, ids: SpecialIds) -> bool:
    """Whether the image tokens of each image, and then its ``</img>``, follow its ``<img>``, and are nowhere else."""
    counts = image_tokens(grids)
    context = np.flatnonzero(tokens == ids.image_context)
    total = int(counts.sum())
    if len(context) != total:  # checked before an array is allocated whose size depends on grids alone
        return False
    expected = np.arange(total) + np.repeat(starts + 1 - (np.cumsum(counts) - counts), counts)
    ends = np.flatnonzero(tokens == ids.image_end)
    return np.array_equal(context, expected) and np.array_equal(ends, starts + 1 + counts)
