"""Preprocessing of 200 photographs, compared to the least code that does the same work.

The baselines are straight loops without any of our code: no check of a record, no index, no manifest. The tokenizer is
loaded before the clock starts, on both sides.
"""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.table import Row, side_by_side
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.image import smart_resize
from neo_megatron.data.prepare.annotation_slices import slices
from neo_megatron.data.prepare.executors import LocalExecutor
from neo_megatron.data.prepare.output import open_output
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.choose import choose_schemas
from neo_megatron.data.prepare.worker import SliceWorker, Task
from neo_megatron.data.tokenizer_process import load_parts
from neo_megatron.worker_pool import in_order

BATCH = 256
UNIT = "samples per CPU-second"
HEADER = PreprocessConfig(check="header")
DECODE = PreprocessConfig()
PATCHES = PreprocessConfig(image_store="patches")


def measure(scratch: Path) -> list[Row]:
    """CPU seconds of preprocessing for each image store, next to the least code that does the same work."""
    photos = write_photos(scratch / "photos").parent
    parts = load_parts(write_tokenizer(scratch / "tokenizer"))
    output = scratch / "preprocess"
    rows = []
    for what, settings, copies, images, target in (
        ("images kept encoded, header checked", HEADER, 10, True, ">= 0.7"),  # enough copies for a second of work
        ("images kept encoded, decoded as a check", DECODE, 1, True, ">= 0.85"),
        ("images as patches", PATCHES, 1, True, ">= 0.85"),
        ("text alone", DECODE, 20, False, ""),
    ):
        file = _write_annotations(photos, copies, images)
        (source,) = choose_schemas([Source("photos", str(file), str(photos))])
        worker = SliceWorker(Task([source], parts.json, parts.ids, settings, "fail", open_output(output)))
        tokenizer = Tokenizer.from_str(parts.json)

        def ours(worker=worker, source=source, settings=settings) -> None:
            _emptied(output)
            for piece in slices([source], settings.records_per_shard):
                worker.run(piece)

        def floor(tokenizer=tokenizer, file=file, settings=settings) -> None:
            _least(file, tokenizer, _emptied(output), _stored(settings))

        ours()  # reads the photographs into the page cache
        count = len(file.read_text().splitlines())
        own, least = (count / seconds for seconds in side_by_side([ours, floor]))
        rows.append(Row(f"preprocess, {what}", UNIT, own, least, "the same work in a loop", target))
        if settings is HEADER:
            rows.append(Row(f"preprocess, {what}", UNIT, own, 600, "target", ">= 1"))
    rows.append(_two_workers(scratch, photos, parts))
    shutil.rmtree(output)
    return rows


def _write_annotations(photos: Path, copies: int, images: bool) -> Path:
    """Writes the records of the photographs several times; no text repeats, so that nothing is tokenized twice."""
    records = [json.loads(line) for line in (photos / "annotations.jsonl").read_text().splitlines()]
    path = photos / f"annotations_{copies}_{'images' if images else 'text'}.jsonl"
    lines = []
    for number in range(copies * len(records)):
        record = records[number % len(records)]
        turns = [turn | {"value": f"{turn['value']} ({number})"} for turn in record["conversations"]]
        if images:
            lines.append(json.dumps(record | {"conversations": turns}))
        else:
            turns[0]["value"] = turns[0]["value"].replace("<image>\n", "")
            lines.append(json.dumps({"conversations": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _least(file: Path, tokenizer: Tokenizer, output: Path, stored: Callable[[bytes], bytes]) -> None:
    """Reads, hashes, looks at the images, tokenizes in batches, writes."""
    digests = hashlib.sha256(), hashlib.sha256()
    texts: list[str] = []
    with file.open("rb") as lines, (output / "images").open("wb") as pixels, (output / "tokens").open("wb") as tokens:

        def write_tokens() -> None:
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array(encoding.ids, np.int32)
                digests[0].update(ids)
                tokens.write(ids)
            texts.clear()

        for number, line in enumerate(lines, start=1):
            record = json.loads(line)
            if "image" in record:
                data = stored((file.parent / record["image"]).read_bytes())
                digests[1].update(data)
                pixels.write(data)
            texts += [turn["value"] for turn in record["conversations"]]
            if number % BATCH == 0:
                write_tokens()
        write_tokens()


def _stored(settings: PreprocessConfig) -> Callable[[bytes], bytes]:
    """The least work on the bytes of an image file."""

    def header(data: bytes) -> bytes:
        assert Image.open(io.BytesIO(data)).size
        return data

    def rgb(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")

    def decode(data: bytes) -> bytes:
        rgb(data)
        return data

    def patches(data: bytes) -> bytes:
        image = rgb(data)
        height, width = smart_resize(image.height, image.width, 32, settings.min_pixels, settings.max_pixels)
        return image.resize((width, height), Image.Resampling.BICUBIC).tobytes()

    if settings.image_store == "patches":
        return patches
    return decode if settings.check == "decode" else header


def _two_workers(scratch: Path, photos: Path, parts) -> Row:
    """Wall time; the processes are started and have loaded their tokenizer before the clock starts."""
    settings = replace(DECODE, records_per_shard=50)
    (source,) = choose_schemas([Source("photos", str(_write_annotations(photos, 6, images=True)), str(photos))])
    pieces = list(slices([source], settings.records_per_shard))
    seconds = []
    for workers in (1, 2):
        task = Task([source], parts.json, parts.ids, settings, "fail", open_output(_emptied(scratch / "preprocess")))
        engine = LocalExecutor(task, workers, lambda *_: None)
        for _ in in_order(engine, iter(pieces[:workers])):
            pass
        start = time.perf_counter()
        for _ in in_order(engine, iter(pieces)):
            pass
        seconds.append(time.perf_counter() - start)
        engine.close()
    one, two = (6 * 200 / second for second in seconds)
    return Row("preprocess, two workers", "samples per second", two, one, "one worker", ">= 1.8")
