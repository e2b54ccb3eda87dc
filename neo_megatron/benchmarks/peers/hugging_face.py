"""Hugging Face datasets: Parquet files, streamed, with its shuffle buffer, `map` and `state_dict`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, Value, load_dataset

from neo_megatron.benchmarks.peers.pairs import PAIRS_OF_A_TAR, read_pairs
from neo_megatron.benchmarks.peers.work import SHUFFLE_BUFFER, Concatenation, Work

datasets.disable_progress_bars()


def prepare(tars: Path, directory: Path) -> None:
    """Writes the pairs of the tars to Parquet files, as many as there are tars."""
    features = Features({"number": Value("int64"), "image": Image(), "caption": Value("string")})

    def pairs() -> Iterator[dict[str, Any]]:
        for number, image, caption in read_pairs(tars):
            yield {"number": number, "image": {"bytes": image, "path": None}, "caption": caption}

    made = Dataset.from_generator(pairs, features=features, cache_dir=str(directory.with_suffix(".cache")))
    directory.mkdir()
    files = -(-len(made) // PAIRS_OF_A_TAR)
    for number in range(files):
        made.shard(files, number).to_parquet(directory / f"{number:05d}.parquet")


class StreamingLoader:
    """A `work.Loader` over Parquet."""

    def __init__(self, directory: Path, work: Work) -> None:
        files = sorted(map(str, directory.glob("*.parquet")))
        pairs = load_dataset("parquet", data_files=files, split="train", streaming=True)

        def encode(pair: dict[str, Any]) -> dict[str, Any]:
            return {"sample": work.sample(pair["number"], pair["image"], pair["caption"])}

        shuffled = pairs.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
        self._samples = shuffled.map(encode, remove_columns=["number", "image", "caption"])
        self._work = work
        self._packs: Concatenation | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        samples = (pair["sample"] for pair in self._samples)
        self._packs = Concatenation(self._work, samples, self._samples.state_dict)
        return iter(self._packs)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self._packs.state))

    def restore(self, path: Path) -> None:
        self._samples.load_state_dict(json.loads(path.read_text()))
