"""WebDataset: the tars as they are; it has no state, so resuming reads and drops the samples before."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset

from neo_megatron.benchmarks.peers.work import SHUFFLE_BUFFER, Concatenation, Sample, Work


def prepare(tars: Path, directory: Path) -> None:
    """Links the tars into a directory; nothing has to be prepared."""
    directory.mkdir()
    for tar in tars.glob("*.tar"):
        (directory / tar.name).hardlink_to(tar)


class TarLoader:
    """A `work.Loader` over tars."""

    def __init__(self, directory: Path, work: Work) -> None:
        self._urls, self._work = sorted(map(str, directory.glob("*.tar"))), work
        self._first = self._drawn = 0
        self._packs: Concatenation | None = None

    def _samples(self) -> Iterator[Sample]:
        pairs = (
            webdataset.WebDataset(self._urls, shardshuffle=100, detshuffle=True, seed=0)
            .shuffle(SHUFFLE_BUFFER, rng=random.Random(0))
            .slice(self._first, None)  # before decoding, so that what is dropped is only read
            .decode("pil")
            .to_tuple("__key__", "jpg", "txt")
            .map(lambda pair: self._work.sample(int(pair[0]), pair[1], pair[2]))
        )
        for sample in webdataset.WebLoader(pairs, batch_size=None, num_workers=0):
            self._drawn += 1
            yield sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._drawn = self._first
        self._packs = Concatenation(self._work, self._samples(), lambda: self._drawn)
        return iter(self._packs)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self._packs.state))

    def restore(self, path: Path) -> None:
        self._first = json.loads(path.read_text())
