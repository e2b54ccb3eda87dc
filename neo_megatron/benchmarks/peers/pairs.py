"""The pairs to load: the photographs with captions, in tars as img2dataset writes them."""

import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from neo_megatron.benchmarks.photos import sentence

PAIRS = 2000
PAIRS_OF_A_TAR = 100


def write_tars(images: Sequence[bytes], directory: Path, count: int) -> None:
    """Writes ``00000.tar`` and so on with a ``.jpg``, a ``.txt`` and a ``.json`` for each pair.

    Each image is there several times, with captions of 1 to 16 sentences.
    """
    words = random.Random(345)
    directory.mkdir(parents=True)
    for first in range(0, count, PAIRS_OF_A_TAR):
        with tarfile.open(directory / f"{first // PAIRS_OF_A_TAR:05d}.tar", "w") as tar:
            for number in range(first, min(first + PAIRS_OF_A_TAR, count)):
                caption = " ".join(sentence(words) for _ in range(words.choice([1, 1, 2, 4, 8, 16])))
                facts = {"key": f"{number:09d}", "status": "success", "caption": caption}
                for suffix, data in (
                    ("jpg", images[number % len(images)]),
                    ("txt", caption.encode()),
                    ("json", json.dumps(facts).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def read_pairs(tars: Path) -> Iterator[tuple[int, bytes, str]]:
    """(number, bytes of the image, caption) of each pair of the tars of a directory, in order."""
    for path in sorted(tars.glob("*.tar")):
        members: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                members[suffix] = tar.extractfile(member).read()
                if suffix == "json":  # the last of a pair
                    yield int(key), members["jpg"], members["txt"].decode()
