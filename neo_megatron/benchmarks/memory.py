"""Memory of preprocessing: the largest process on annotation files of 5 GB, compared to one of 50 MB."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.table import Row
from neo_megatron.benchmarks.tokenizer import write_tokenizer

_SMALL, _LARGE = 50_000_000, 5_000_000_000
_RECORDS = 5000  # that are drawn from a file of any size; all of the file is read


def measure(scratch: Path) -> list[Row]:
    """Peak memory of preprocessing annotation files of 5 GB, next to 50 MB."""
    photos = write_photos(scratch / "photos")
    rows = []
    for suffix, form in ((".json", "JSON array"), (".jsonl", "JSONL")):
        small, large = (_peak(scratch, photos, size, suffix) for size in (_SMALL, _LARGE))
        what = f"memory of preprocessing a {form} of 5 GB, largest of all processes"
        rows.append(Row(what, "MB", large, small, "of 50 MB", "<= 1000"))
    return rows


def _peak(scratch: Path, photos: Path, size: int, suffix: str) -> float:
    """MB of the largest process of a run with two workers."""
    annotations, output = photos.parent / f"large{suffix}", scratch / "memory"
    count = _write(photos, annotations, size)
    registry = scratch / "registry.yaml"
    entry = {"annotation_path": str(annotations.resolve()), "data_path": str(photos.parent.resolve())}
    registry.write_text(yaml.safe_dump({"large": entry}))
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "neo_megatron", "preprocess", "--registry", str(registry)]
    command += ["--datasets", f"large%{100 * _RECORDS / count}"]
    command += ["--tokenizer", str(write_tokenizer(scratch / "tokenizer")), "--output", str(output), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, *map(_high_water_mark, _members(process.pid)), 0)
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    annotations.unlink()
    shutil.rmtree(output)
    return peak / 1000


def _write(photos: Path, path: Path, size: int) -> int:
    """The records of the photographs until the file is that large; returns how many there are."""
    records = [json.loads(line) for line in photos.read_text().splitlines()]
    block = ",\n".join(map(json.dumps, records)) if path.suffix == ".json" else "\n".join(map(json.dumps, records))
    times = -(-size // len(block))
    with path.open("w") as file:
        file.write("[" if path.suffix == ".json" else "")
        for number in range(times):
            file.write(block)
            file.write("\n" if path.suffix == ".jsonl" else "]" if number == times - 1 else ",\n")
    return times * len(records)


def _members(group: int) -> list[int]:
    """Processes of a session."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _session(int(name)) == group]


def _session(process: int) -> int:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return -1


def _high_water_mark(process: int) -> int:
    """Most memory that a process has had so far, in kB; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else 0
