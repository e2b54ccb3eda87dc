"""The training loader: data set and collator on 200 photographs, compared to what bytes and pixels cost at least."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.sources import write_sources
from neo_megatron.benchmarks.table import Row, side_by_side
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.data.config import ImageStore, PreprocessConfig
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import StoredSample

LENGTH = 8192
# Samples per CPU-second of its data set and collator on these photographs, measured on the same kind of machine.
PUBLIC_KIT = 30


def write_store(scratch: Path, store: ImageStore) -> Path:
    """Packs of the photographs, by reference to a tar of them; keeps what an earlier call wrote."""
    shards, packs = scratch / f"shards-{store}", scratch / f"packs-{store}"
    if not packs.exists():
        photos = write_photos(scratch / "photos")
        file = write_sources(photos.parent, scratch / "sources")["tar"] if store == "reference" else photos
        source = Source("photos", str(file), str(photos.parent))
        preprocess([source], write_tokenizer(scratch / "tokenizer"), shards, PreprocessConfig(image_store=store))
        write_packs([PackInput(str(shards))], packs, LENGTH)
    return packs


def measure(scratch: Path) -> list[Row]:
    """CPU seconds of reading packs from each image store, next to the least that bytes and pixels cost."""
    rows: list[Row] = []
    encoded, decode = _load(scratch, "encoded"), _decode(scratch, "encoded")
    ours, least, referred = _rates([encoded, decode, _load(scratch, "reference")])
    unit = "samples per CPU-second"
    rows.append(Row("loader, images kept encoded", unit, ours, PUBLIC_KIT, "public kit", ">= 2.5"))
    rows.append(Row("loader, images kept encoded", unit, ours, least, "decode and resize alone"))
    rows.append(Row("loader, images in a tar by reference", unit, referred, ours, "images kept encoded", ">= 0.9"))
    ours, least = _rates([_load(scratch, "patches"), _copy(scratch, "patches")])
    rows.append(Row("loader, images kept as patches", unit, ours, PUBLIC_KIT, "public kit", ">= 25"))
    rows.append(Row("loader, images kept as patches", unit, ours, least, "a copy of the bytes", ">= 0.6"))
    return rows


@dataclass(frozen=True)
class _Work:
    """A piece of work, and the samples that it reads."""

    samples: int
    run: Callable[[], None]


def _rates(works: Sequence[_Work]) -> list[float]:
    """Samples per CPU-second of each."""
    seconds = side_by_side([work.run for work in works])
    return [work.samples / taken for work, taken in zip(works, seconds, strict=True)]


def _load(scratch: Path, store: ImageStore) -> _Work:
    """Reads an epoch of packs, each time the next one."""
    dataset = PackDataset(write_store(scratch, store), 1_000_000, seed=0)
    numbers = iter(range(1_000_000))

    def load() -> None:
        for _ in range(len(dataset.packs)):
            collate([dataset[next(numbers)]])

    load()
    return _Work(len(dataset.packs.data), load)


def _samples(scratch: Path, store: ImageStore) -> list[StoredSample]:
    (shards,) = PackDataset(write_store(scratch, store), 1, seed=0).packs.data.sets
    return shards.fetch(range(len(shards)))


def _copy(scratch: Path, store: ImageStore) -> _Work:
    every = _samples(scratch, store)

    def copy() -> None:
        for stored in every:
            for image in stored.images:
                np.array(image)

    return _Work(len(every), copy)


def _decode(scratch: Path, store: ImageStore) -> _Work:
    every = _samples(scratch, store)

    def decode() -> None:
        for stored in every:
            for data, (rows, columns) in zip(stored.images, stored.grids.tolist(), strict=True):
                image = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
                image.resize((columns * 16, rows * 16), Image.Resampling.BICUBIC)

    return _Work(len(every), decode)
