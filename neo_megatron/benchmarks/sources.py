"""Preprocessing of the same photographs from files of every kind, compared to JSON and loose files."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.table import Row, side_by_side
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.annotation_slices import slices
from neo_megatron.data.prepare.output import open_output
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.choose import choose_schemas
from neo_megatron.data.prepare.worker import SliceWorker, Task
from neo_megatron.data.tokenizer_process import load_parts

COPIES = 3
KINDS = {
    "jsonl": "as loose files",
    "tar": "in a tar",
    "parquet": "in Parquet",
    "arrow": "in Arrow",
    "jsonl.gz": "as loose files, JSON in gzip",
}
ROWS_OF_A_GROUP = 100
CHECKS = {"header": "header checked", "decode": "decoded as a check"}


def write_sources(photos: Path, directory: Path) -> dict[str, Path]:
    """Writes the records of the photographs into a file of each kind, by suffix; keeps what an earlier call wrote.

    Each photograph is there several times, so that opening and closing files does not count.
    """
    import pyarrow
    import pyarrow.parquet

    directory.mkdir(parents=True, exist_ok=True)
    files = {kind: directory / f"photos.{kind}" for kind in KINDS}
    if all(file.exists() for file in files.values()):
        return files
    lines = (photos / "annotations.jsonl").read_text() * COPIES
    files["jsonl"].write_text(lines)
    records = [json.loads(line) for line in lines.splitlines()]
    images = [(photos / record["image"]).read_bytes() for record in records]
    with tarfile.open(files["tar"], "w") as tar:
        for number, (record, image) in enumerate(zip(records, images, strict=True)):
            turns = json.dumps({"conversations": record["conversations"]}).encode()
            for suffix, data in (("jpg", image), ("json", turns)):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = pyarrow.table(
        {
            "image": [{"bytes": image, "path": None} for image in images],
            "conversations": [record["conversations"] for record in records],
        }
    )
    # Pages of a megabyte, as writers of images are advised to make them.
    pyarrow.parquet.write_table(table, files["parquet"], row_group_size=ROWS_OF_A_GROUP, write_batch_size=1)
    with pyarrow.OSFile(str(files["arrow"]), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_OF_A_GROUP)
    with gzip.open(files["jsonl.gz"], "wb") as text:
        text.write(lines.encode())
    return files


def measure(scratch: Path) -> list[Row]:
    """CPU seconds of preprocessing from each kind of file, next to JSON and loose files."""
    photos = write_photos(scratch / "photos").parent
    files = write_sources(photos, scratch / "sources")
    parts = load_parts(write_tokenizer(scratch / "tokenizer"))
    rows = []
    for check, words in CHECKS.items():
        works: list[Callable[[], None]] = []
        for kind, file in files.items():
            (source,) = choose_schemas([Source("photos", str(file), str(photos))])
            output = scratch / f"from-{kind}"
            settings = PreprocessConfig(check=check)  # type: ignore[arg-type]
            worker = SliceWorker(Task([source], parts.json, parts.ids, settings, "fail", open_output(output)))

            def work(worker=worker, source=source, output=output, settings=settings) -> None:
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir()
                for piece in slices([source], settings.records_per_shard):
                    worker.run(piece)

            work()  # reads the files into the page cache
            works.append(work)
        count = len(files["jsonl"].read_text().splitlines())
        plain, *others = (count / seconds for seconds in side_by_side(works))
        for kind, rate in zip(list(KINDS)[1:], others, strict=True):
            what = f"preprocess, images {KINDS[kind]}, {words}"
            rows.append(Row(what, "samples per CPU-second", rate, plain, "JSON and loose files", ">= 0.9"))
    for kind in files:
        shutil.rmtree(scratch / f"from-{kind}")
    return rows
