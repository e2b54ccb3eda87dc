"""The training loader on 200 photographs from an S3 server on this machine, compared to the local disk.

The server is moto's, a Python program in a process of its own. It is the limit of samples per second; what a sample
costs the training process is the figure per CPU-second.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from neo_megatron.benchmarks.loader import LENGTH
from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.table import Row, cpu_seconds
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.data.config import ImageStore, PreprocessConfig
from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.storage.object_requests import connection

_BUCKET = "benchmark"
_REPEATS = 3
_RECORDS_PER_SHARD = 10  # moto reads an entire object for every range of it


def measure(scratch: Path) -> list[Row]:
    """Time of reading packs from an S3 server on this machine, next to the local disk."""
    rows: list[Row] = []
    with _server(scratch) as client:
        for store in ("encoded", "patches"):
            local = _write_store(scratch / "storage" / store, scratch, store)
            for path in local.parent.rglob("*"):
                if path.is_file():
                    client.upload_file(str(path), _BUCKET, f"{store}/{path.relative_to(local.parent)}")
            datasets = [PackDataset(place, 1_000_000, seed=0) for place in (f"s3://{_BUCKET}/{store}/packs", local)]
            (cpu, wall), (local_cpu, local_wall) = _times(datasets)
            samples = sum(len(shards) for shards in datasets[0].packs.data.sets)
            kept = "encoded" if store == "encoded" else "as patches"
            what = f"loader from S3, images kept {kept}, up to {connection().connections} requests at once"
            rows.append(Row(what, "samples per CPU-second", samples / cpu, samples / local_cpu, "local disk"))
            rows.append(Row(what, "samples per second", samples / wall, samples / local_wall, "local disk"))
    return rows


def _write_store(directory: Path, scratch: Path, store: ImageStore) -> Path:
    """Packs of the photographs next to their shards; keeps what an earlier call wrote."""
    shards, packs = directory / "shards", directory / "packs"
    if not packs.exists():
        photos = write_photos(scratch / "photos")
        source = Source("photos", str(photos), str(photos.parent))
        settings = PreprocessConfig(image_store=store, records_per_shard=_RECORDS_PER_SHARD)
        directory.mkdir(parents=True, exist_ok=True)
        preprocess([source], write_tokenizer(scratch / "tokenizer"), shards, settings)
        write_packs([PackInput(str(shards))], packs, LENGTH)
    return packs


def _times(datasets: list[PackDataset]) -> list[tuple[float, float]]:
    """Best (CPU, wall) seconds to load all packs of each data set; they take turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in datasets]
    for turn in range(_REPEATS + 1):
        for dataset, of_dataset in zip(datasets, times, strict=True):
            start = time.perf_counter()
            first = turn * len(dataset.packs)
            cpu = cpu_seconds(lambda dataset=dataset, first=first: _load(dataset, first))
            if turn:  # the first fills the cache of indices, as a training run does once
                of_dataset.append((cpu, time.perf_counter() - start))
    return [(min(cpu for cpu, _ in of_dataset), min(wall for _, wall in of_dataset)) for of_dataset in times]


def _load(dataset: PackDataset, first: int) -> None:
    for number in range(first, first + len(dataset.packs)):
        collate([dataset[number]])


@contextmanager
def _server(scratch: Path) -> Iterator[Any]:
    """A client for an empty bucket on a server of its own, to which the environment points."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NEO_CACHE_DIR": str(scratch / "cache"),
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with patch.dict(os.environ, variables):
            while True:
                if server.poll() is not None:
                    raise RuntimeError("moto's server has ended: pip install 'moto[server]'")
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            client = boto3.client("s3")
            client.create_bucket(Bucket=_BUCKET)
            yield client
    finally:
        server.terminate()
        server.wait()
