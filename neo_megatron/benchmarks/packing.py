"""Packing at scale: from lengths to the index on disk, and what a resume costs in a data set of 100 million samples."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from neo_megatron.benchmarks.lengths import draw_lengths
from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.table import Row
from neo_megatron.benchmarks.tokenizer import write_tokenizer

LENGTH = 16384
_MILLION = 1_000_000
_SAMPLES_PER_SHARD = 8192

# Each runs in a process of its own, so that its peak of memory is its own.
_PACK = """
import json, sys, time
from pathlib import Path
import numpy as np
from neo_megatron.data.packs.index import open_table
from neo_megatron.data.packs.writer import reported_imbalance, write_table
from neo_megatron.data.packs.units import Units
def memory(kind):
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) * 1024
before = memory("VmRSS")
lengths, image_tokens = (np.load(f"{sys.argv[1]}.{name}.npy") for name in ("lengths", "image_tokens"))
output = Path(sys.argv[2])
start = time.process_time()
files = write_table(output, Units.of_samples(lengths, image_tokens), int(sys.argv[3]))
seconds = time.process_time() - start
peak = memory("VmHWM") - before
table = open_table(output, files)
seen = np.zeros(len(lengths), np.uint8)
for first in range(0, len(table), 65536):
    seen[table.samples(table.draw(0, 0, np.arange(first, min(first + 65536, len(table)))).units)] += 1
once = (seen == 1).all()
fill = float(lengths.sum(dtype=np.int64) / (len(table) * int(sys.argv[3])))
print(json.dumps({
    "seconds": seconds, "bytes": peak / len(lengths), "packs": len(table), "once": bool(once),
    "fill": fill, "imbalance": reported_imbalance(table),
}))
"""

_RESUME = """
import sys, time
import torch, PIL.Image
from neo_megatron.data.dataset import GlobalBatch, PackDataset
start = time.perf_counter()
consumed = int(sys.argv[2])
batch = GlobalBatch(1024, 128, 1, start=consumed)
PackDataset(sys.argv[1], consumed + 1024, seed=1234, global_batch=batch)[consumed]
print(time.perf_counter() - start)
"""


def measure(scratch: Path) -> list[Row]:
    """Time and memory of packing 10 and 100 million samples, and of resuming among them."""
    rows: list[Row] = []
    for millions, seconds, repeats in ((10, 10, 3), (100, 120, 1)):
        results = [_pack(scratch, millions * _MILLION) for _ in range(repeats)]
        result = sorted(results, key=lambda result: result["seconds"])[repeats // 2]
        name = f"packing {millions} million lengths at {LENGTH}, to the index on disk"
        if not result["once"]:
            raise AssertionError(f"{name}: a sample was lost")
        rows += [
            Row(name, "CPU-seconds", result["seconds"], target=f"<= {seconds}"),
            Row(f"{name}: padding, nothing lost", "%", 100 * (1 - result["fill"]), target="<= 0.1"),
            Row(f"{name}: memory, lengths included", "bytes a sample", result["bytes"], target="<= 64"),
        ]
    even = result["imbalance"]
    for kind, drawn in even["drawn"].items():
        what = f"imbalance of {kind} (max/mean of {even['ranks']} ranks, {even['packs_per_rank']} packs each)"
        rows.append(Row(what, "", even["balanced"][kind], drawn, "as drawn", "as near to 1 as can be"))
    packs = _hundred_million(scratch)
    for consumed in (0, 5 * _MILLION, 500 * _MILLION):
        done = subprocess.run([sys.executable, "-c", _RESUME, packs, str(consumed)], capture_output=True, check=True)
        what = f"resume after {consumed:,} packs of a data set of 100 million samples, to the first item"
        rows.append(Row(what, "seconds", float(done.stdout), target="<= 1"))
    return rows


def _pack(scratch: Path, count: int) -> dict:
    stem = scratch / f"mix-{count}"
    if not Path(f"{stem}.image_tokens.npy").exists():
        for name, array in zip(("lengths", "image_tokens"), draw_lengths(count), strict=True):
            np.save(f"{stem}.{name}.npy", array)
    output = scratch / "table"
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _PACK, str(stem), str(output), str(LENGTH)]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    shutil.rmtree(output)
    return result


def _hundred_million(scratch: Path) -> Path:
    """Packs of 12,208 shards of 8,192 samples, which are all the same files under many names."""
    from neo_megatron.data.config import PreprocessConfig
    from neo_megatron.data.packs.writer import PackInput, write_packs
    from neo_megatron.data.prepare.preprocess import preprocess
    from neo_megatron.data.prepare.registry import Source
    from neo_megatron.storage.base import MANIFEST

    packs, shards = scratch / "hundred-million-packs", scratch / "hundred-million"
    if packs.exists():
        return packs
    shutil.rmtree(shards, ignore_errors=True)
    photos = write_photos(scratch / "photos")
    lines = photos.read_text().splitlines(keepends=True)
    annotations = photos.parent / "shard.jsonl"
    annotations.write_text("".join((lines * (_SAMPLES_PER_SHARD // len(lines) + 1))[:_SAMPLES_PER_SHARD]))
    source = Source("photos", str(annotations), str(photos.parent))
    preprocess([source], write_tokenizer(scratch / "tokenizer"), shards, PreprocessConfig(check="header"))
    manifest = json.loads((shards / MANIFEST).read_text())
    (entry,) = manifest["shards"]
    for number in range(1, 100 * _MILLION // _SAMPLES_PER_SHARD + 1):
        name = f"{number:05d}"
        files = {file.replace(entry["name"], name, 1): facts for file, facts in entry["files"].items()}
        for old, new in zip(entry["files"], files, strict=True):
            os.link(shards / old, shards / new)
        manifest["shards"].append(entry | {"name": name, "files": files})
    (shards / MANIFEST).write_text(json.dumps(manifest))
    write_packs([PackInput(str(shards))], packs, LENGTH)
    return packs
