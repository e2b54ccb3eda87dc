"""Our own way: shards and packs; the state of the loader is the number of packs that were read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from neo_megatron.benchmarks.peers.pairs import PAIRS_OF_A_TAR
from neo_megatron.benchmarks.peers.work import Work
from neo_megatron.data.config import ImageCheck, ImageStore, PreprocessConfig
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.annotation_slices import slices
from neo_megatron.data.prepare.output import open_output
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.choose import choose_schemas
from neo_megatron.data.prepare.worker import SliceWorker, Task


def _sources(tars: Path) -> list[Source]:
    return choose_schemas([Source("pairs", str(tar)) for tar in sorted(tars.glob("*.tar"))])


def prepare(tars: Path, directory: Path, tokenizer: Path, length: int, store: ImageStore) -> None:
    """Preprocesses and packs as the commands do."""
    preprocess(_sources(tars), tokenizer, directory / "shards", PreprocessConfig(image_store=store))
    pack(directory / "shards", directory / "packs", length)


def pack(shards: Path, output: Path, length: int) -> None:
    """Packs shards."""
    write_packs([PackInput(str(shards))], output, length)


def preprocess_alone(tars: Path, directory: Path, work: Work, store: ImageStore, check: ImageCheck) -> None:
    """The work of `preprocess` in this process, without starting others and reading the tokenizer."""
    sources, settings = _sources(tars), PreprocessConfig(image_store=store, check=check)
    worker = SliceWorker(Task(sources, work.tokenizer_json, work.ids, settings, "fail", open_output(directory)))
    for piece in slices(sources, settings.records_per_shard):
        worker.run(piece)


class OurLoader:
    """A `work.Loader` over packs."""

    def __init__(self, directory: Path, work: Work) -> None:
        self._dataset = PackDataset(directory / "packs", None, seed=0)
        self._read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rest = range(self._read, len(self._dataset))
        for pack in DataLoader(self._dataset, batch_size=1, sampler=rest, collate_fn=collate):
            self._read += 1
            yield pack

    def numbers(self) -> list[int]:
        """Numbers of the pairs of the last pack; the tars are sources in order, with as many records each."""
        places = self._dataset.describe(self._read - 1)
        return [int(Path(file).stem) * PAIRS_OF_A_TAR + record for file, record in places]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self._read))

    def restore(self, path: Path) -> None:
        self._read = json.loads(path.read_text())
