"""Writes the records of a test and their images as each kind of annotation file."""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Record = dict[str, Any]


def write(kind: str, path: Path, records: Sequence[Record], images: Path, **options: Any) -> Path:
    """Writes records; their images are in the container if the kind can hold them.

    Args:
        kind: a key of `KINDS`.
        path: without a suffix; the suffix of the kind is added.
        records: in the published form, with names of files under "image" in ``images``.
        images: directory of the images.
        options: of the writer.
    """
    writer, suffix = KINDS[kind]
    path = path.with_name(path.name + suffix)
    writer(path, records, images, **options)
    return path


def text_of(records: Sequence[Record], path: Path) -> bytes:
    lines = [json.dumps(record) for record in records]
    return ("\n".join(lines) + "\n" if ".jsonl" in path.name else "[" + ",\n".join(lines) + "]").encode()


def named_images(record: Record) -> list[str]:
    names = record.get("image", [])
    return names if isinstance(names, list) else [names]


def _plain(path: Path, records: Sequence[Record], images: Path) -> None:
    path.write_bytes(text_of(records, path))


def _gzip(path: Path, records: Sequence[Record], images: Path) -> None:
    path.write_bytes(gzip.compress(text_of(records, path)))


def _zstd(path: Path, records: Sequence[Record], images: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(text_of(records, path))


def table_of(records: Sequence[Record], images: Path, image: str) -> pa.Table:
    """A table with the images as "bytes", "struct" ({bytes, path}) or "path"."""

    def column(record: Record) -> list[Any]:
        data = {name: (images / name).read_bytes() for name in named_images(record)}
        forms = {
            "bytes": list(data.values()),
            "struct": [{"bytes": content, "path": name} for name, content in data.items()],
            "path": list(data),
        }
        return forms[image]

    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    kinds = {
        "bytes": pa.binary(),
        "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "path": pa.string(),
    }
    return pa.table(
        {
            "image": pa.array([column(record) for record in records], pa.list_(kinds[image])),
            "conversations": pa.array([record["conversations"] for record in records], turns),
        }
    )


def _parquet(path: Path, records: Sequence[Record], images: Path, image: str = "bytes", **options: Any) -> None:
    pq.write_table(table_of(records, images, image), path, **{"row_group_size": 5, **options})


def _parquet_struct(path: Path, records: Sequence[Record], images: Path) -> None:
    _parquet(path, records, images, "struct")


def _arrow_file(path: Path, records: Sequence[Record], images: Path) -> None:
    table = table_of(records, images, "struct")
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _arrow_stream(path: Path, records: Sequence[Record], images: Path) -> None:
    table = table_of(records, images, "struct")
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _tar(path: Path, records: Sequence[Record], images: Path, format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for number, record in enumerate(records):
            names = named_images(record)
            members = [(f"{number:05d}.{index}.png", (images / name).read_bytes()) for index, name in enumerate(names)]
            written = {key: value for key, value in record.items() if key != "image"}
            for name, data in [*members, (f"{number:05d}.json", json.dumps(written).encode())]:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


KINDS = {
    "jsonl": (_plain, ".jsonl"),
    "json": (_plain, ".json"),
    "jsonl.gz": (_gzip, ".jsonl.gz"),
    "json.gz": (_gzip, ".json.gz"),
    "jsonl.zst": (_zstd, ".jsonl.zst"),
    "json.zst": (_zstd, ".json.zst"),
    "parquet": (_parquet, ".parquet"),
    "parquet struct": (_parquet_struct, ".parquet"),
    "arrow file": (_arrow_file, ".arrow"),
    "arrow stream": (_arrow_stream, ".arrow"),
    "tar": (_tar, ".tar"),
}
