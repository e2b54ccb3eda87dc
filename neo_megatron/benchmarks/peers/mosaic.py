"""MosaicML Streaming: MDS shards, its data set with a transform, and its loader."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from neo_megatron.benchmarks.peers.pairs import read_pairs
from neo_megatron.benchmarks.peers.work import Concatenation, Sample, Work, header


def prepare(tars: Path, directory: Path) -> None:
    """Writes the pairs of the tars to MDS shards of the usual size."""
    columns = {"number": "int", "image": "bytes", "caption": "str"}
    with MDSWriter(out=str(directory), columns=columns) as writer:
        for number, image, caption in read_pairs(tars):
            writer.write({"number": number, "image": image, "caption": caption})


class _Pairs(StreamingDataset):
    def __init__(self, work: Work, **settings: Any) -> None:
        super().__init__(**settings)
        self._work = work

    def __getitem__(self, at: int) -> Sample:
        pair = super().__getitem__(at)
        return self._work.sample(pair["number"], header(pair["image"]), pair["caption"])


class MosaicLoader:
    """A `work.Loader` over MDS shards."""

    def __init__(self, directory: Path, work: Work) -> None:
        clean_stale_shared_memory()
        dataset = _Pairs(work, local=str(directory), shuffle=True, shuffle_seed=0, batch_size=1)
        self._loader = StreamingDataLoader(dataset, batch_size=1, collate_fn=lambda samples: {"samples": samples})
        self._packs: Concatenation | None = None
        self._work = work

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # The loader counts what it has yielded; its full state is asked for when it is saved.
        samples = (batch["samples"][0] for batch in self._loader)
        self._packs = Concatenation(self._work, samples, lambda: self._loader.num_samples_yielded)
        return iter(self._packs)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self._loader.dataset.state_dict(self._packs.state, from_beginning=False)))

    def restore(self, path: Path) -> None:
        self._loader.load_state_dict(json.loads(path.read_text()))
