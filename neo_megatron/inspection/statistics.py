"""Statistics of a data set, counted from its indices; no token and no image is read."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.rejects import read_rejects
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.errors import DataError
from neo_megatron.storage.base import Directory

EXAMPLES = 3  # rejected samples shown for each reason
_CHUNK = 1 << 20


@dataclass
class SourceCounts:
    """Counts of one annotation file: samples, images, and tokens by kind."""

    name: str
    samples: int = 0
    images: int = 0
    image_tokens: int = 0
    trained_tokens: int = 0
    other_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.trained_tokens + self.other_tokens


@dataclass
class Statistics:
    """Statistics of a data set, or of one epoch of packs.

    Args:
        sources: in the order of the manifests.
        lengths: int64 [longest + 1], samples of each number of tokens.
        rejected: reason -> number of samples.
        examples: reason -> the first few entries of lists of rejected samples.
    """

    sources: list[SourceCounts]
    lengths: np.ndarray
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def count(data: Mixture, times: np.ndarray | None = None) -> Statistics:
    """Counts all samples, each as often as ``times``, int32 [samples], says; ``None``: once.

    Raises:
        DataError: there is no sample, or a file is damaged.
    """
    result = Statistics([], np.zeros(1, np.int64))
    with tqdm(total=len(data), unit=" samples", desc="count", unit_scale=True, mininterval=0.5) as bar:
        for shards, start in zip(data.sets, data.starts, strict=False):
            sources = [SourceCounts(source["name"]) for source in shards.manifest["sources"]]
            for number, samples in enumerate(shards.entries.samples.tolist()):
                shard = shards.shard(number)  # first, because it detects a wrong number of samples
                uses = np.ones(samples, np.int64)
                if times is not None:
                    uses = times[start : start + samples].astype(np.int64)
                _count_shard(shard, uses, sources, result)
                start += samples
                bar.update(samples)
            result.sources += sources
            _count_rejects(shards.storage, shards.manifest["counts"]["rejected_by_reason"], result)
    if not result.lengths.any():
        raise DataError(
            f"{data.sets[0].location} holds no sample to show; its rejects.jsonl says why each was rejected"
        )
    return result


def _count_shard(shard: Any, uses: np.ndarray, sources: list[SourceCounts], result: Statistics) -> None:
    shard.check_text()
    rows, lengths = shard.samples, np.asarray(shard.tokens.lengths)
    histogram = np.bincount(lengths, uses).astype(np.int64)
    if len(histogram) > len(result.lengths):
        result.lengths = np.concatenate([result.lengths, np.zeros(len(histogram) - len(result.lengths), np.int64)])
    result.lengths[: len(histogram)] += histogram
    for number, source in enumerate(sources):
        own = uses * (rows["source"] == number)
        tokens, images, trained = (int(own @ values) for values in (lengths, shard.image_tokens, rows["trained"]))
        source.samples += int(own.sum())
        source.images += int(own @ rows["pictures"])
        source.image_tokens += images
        source.trained_tokens += trained
        source.other_tokens += tokens - images - trained


def uses_in_epoch(packs: PackIndex) -> np.ndarray:
    """Number of times that each sample is in an epoch of packs: int32 [samples]."""
    units, steps = packs.table.units, np.zeros(len(packs.data) + 1, np.int32)
    for start in range(0, len(units), _CHUNK):
        chosen = packs.table.rows(np.arange(start, min(start + _CHUNK, len(units))))
        np.add.at(steps, chosen["first"], 1)
        np.add.at(steps, chosen["first"] + chosen["samples"], -1)
    return np.cumsum(steps[:-1], out=steps[:-1])


def count_packs(packs: PackIndex, directory: Directory) -> Statistics:
    """Counts one epoch of packs; rejects of packing are added to those of preprocessing."""
    result = count(packs.data, uses_in_epoch(packs))
    kinds = Counter(entry["kind"] for entry in read_rejects(directory))
    _count_rejects(directory, kinds, result)
    return result


def _count_rejects(directory: Directory, counts: dict[str, int], result: Statistics) -> None:
    result.rejected.update(counts)
    wanted = {kind: min(EXAMPLES, number) for kind, number in counts.items()}
    if not wanted:
        return
    _take_examples(read_rejects(directory), wanted, result.examples)


def _take_examples(
    entries: Iterable[dict[str, Any]], wanted: dict[str, int], examples: dict[str, list[dict[str, Any]]]
) -> None:
    """The first rejects of each reason; stops reading when there are enough."""
    for entry in entries:
        if wanted.get(entry["kind"], 0):
            wanted[entry["kind"]] -= 1
            if len(known := examples.setdefault(entry["kind"], [])) < EXAMPLES:
                known.append(entry)
        if not any(wanted.values()):
            return
