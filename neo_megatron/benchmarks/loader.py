"""The training loader: data set and collator on 200 photographs, compared to what bytes and pixels cost at least."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.table import Row, side_by_side
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.data.config import ImageStore, PreprocessConfig
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source

LENGTH = 8192
# Samples per CPU-second of its data set and collator on these photographs, measured on the same kind of machine.
PUBLIC_KIT = 30


def write_store(scratch: Path, store: ImageStore) -> Path:
    """Packs of the photographs; keeps what an earlier call wrote."""
    shards, packs = scratch / f"shards-{store}", scratch / f"packs-{store}"
    if not packs.exists():
        photos = write_photos(scratch / "photos")
        source = Source("photos", str(photos), str(photos.parent))
        preprocess([source], write_tokenizer(scratch / "tokenizer"), shards, PreprocessConfig(image_store=store))
        write_packs([PackInput(str(shards))], packs, LENGTH)
    return packs


def measure(scratch: Path) -> list[Row]:
    """CPU seconds of reading packs from both image stores, next to the least that bytes and pixels cost."""
    rows: list[Row] = []
    for store, factor in (("encoded", 2.5), ("patches", 25)):
        dataset = PackDataset(write_store(scratch, store), 1_000_000, seed=0)
        shards = dataset.packs.data.sets[0]
        every = shards.fetch(range(len(shards)))
        numbers = iter(range(1_000_000))

        def load(dataset: PackDataset = dataset, numbers=numbers) -> None:
            for _ in range(len(dataset.packs)):
                collate([dataset[next(numbers)]])

        def copy(every=every) -> None:
            for stored in every:
                for image in stored.images:
                    np.array(image)

        def decode(every=every) -> None:
            for stored in every:
                for data, (rows, columns) in zip(stored.images, stored.grids.tolist(), strict=True):
                    image = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
                    image.resize((columns * 16, rows * 16), Image.Resampling.BICUBIC)

        floor, floor_name, target = (
            (decode, "decode and resize alone", "") if store == "encoded" else (copy, "a copy of the bytes", ">= 0.6")
        )
        load()
        ours, least = (len(shards) / seconds for seconds in side_by_side([load, floor]))
        what = f"loader, images kept {'encoded' if store == 'encoded' else 'as patches'}"
        unit = "samples per CPU-second"
        rows.append(Row(what, unit, ours, PUBLIC_KIT, "public kit", f">= {factor}"))
        rows.append(Row(what, unit, ours, least, floor_name, target))
    return rows
