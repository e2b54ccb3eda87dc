"""Ours next to loaders that users would pick instead, from the same tars to the same packs of 16,384 tokens.

Each way runs in processes of its own, with one thread and without worker processes; the ways take turns.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from neo_megatron.benchmarks.peers.pairs import PAIRS, write_tars
from neo_megatron.benchmarks.peers.ways import WAYS, Way
from neo_megatron.benchmarks.peers.work import LENGTH, Work
from neo_megatron.benchmarks.photos import write_photos
from neo_megatron.benchmarks.tokenizer import write_tokenizer
from neo_megatron.data.tokenizer_process import load_parts

REPEATS = 3
_COLUMNS = (
    *("way", "prepared once, CPU-s per 1,000 pairs", "pairs per CPU-s", "fill", "pairs lost"),
    *("s (CPU-s) to resume at the middle", "what follows", "bytes per pair", "files", "memory of the loader, MB"),
)


def measure(scratch: Path) -> str:
    """The table of all ways; peers that are not installed are listed below it."""
    root = scratch / f"peers-{PAIRS}"
    if not (root / "tokenizer.json").exists():  # the last of its files; an earlier run left them
        photos = write_photos(scratch / "photos")
        images = [(photos.parent / json.loads(line)["image"]).read_bytes() for line in photos.open()]
        write_inputs(images, root, PAIRS)
    return compare(root, WAYS, REPEATS)


def write_inputs(images: Sequence[bytes], root: Path, pairs: int, length: int = LENGTH) -> None:
    """Writes tars of JPEG images and the tokenizer into a directory, for packs of ``length`` tokens."""
    shutil.rmtree(root, ignore_errors=True)
    write_tars(images, root / "tars", pairs)
    (root / "pairs.json").write_text(json.dumps(pairs))
    parts = load_parts(write_tokenizer(root / "tokenizer"))
    Work.write(root / "tokenizer.json", parts.json, parts.ids, length)


def compare(root: Path, ways: dict[str, Way], repeats: int) -> str:
    """The table of ways over the files of `write_inputs`; those that are not installed are listed below it."""
    installed = {name: way for name, way in ways.items() if way.installed}
    results = run(root, installed, repeats)
    check_same_inputs(results, json.loads((root / "pairs.json").read_text()))
    lines = [_COLUMNS, ["---"] * len(_COLUMNS)]
    lines += [row(way, results[name], root / name, name == "reference") for name, way in installed.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    absent = [
        f"{way.title} was not run, because {way.package} is not installed (docs/benchmarks.md, Peers)"
        for way in ways.values()
        if not way.installed
    ]
    return "\n\n".join([table, *absent])


def run(root: Path, ways: dict[str, Way], repeats: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All measurements: way -> task -> one for each repetition."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in ways}
    for task in ("prepare", "epoch", "resume"):
        for _ in range(repeats):
            for name in ways:
                print(f"  {task} {name}", file=sys.stderr, flush=True)
                results[name].setdefault(task, []).append(_child(task, name, root))
    return results


def _child(task: str, name: str, root: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__name__}.child", task, name, str(root.resolve())]
    # What libraries print goes to standard output too: ours is the last line.
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def check_same_inputs(results: dict[str, dict[str, list[dict[str, Any]]]], pairs: int) -> None:
    """Raises AssertionError if two ways that lose nothing do not make the same tokens and patches."""
    complete = {
        name: (found["epoch"][0]["tokens"], found["epoch"][0]["checksum"])
        for name, found in results.items()
        if len(_numbers(found["epoch"][0]["packs"])) == pairs
    }
    if len(set(complete.values())) > 1:
        raise AssertionError(f"the ways do not make the same model inputs: {complete}")


def _numbers(packs: Sequence[Sequence[int]]) -> set[int]:
    return {number for pack in packs for number in pack}


def row(way: Way, found: dict[str, list[dict[str, Any]]], form: Path, with_tars: bool) -> list[str]:
    """The cells of a way.

    Args:
        way: to describe.
        found: its measurements.
        form: its prepared files.
        with_tars: the tars are needed in addition.
    """
    pairs = json.loads((form.parent / "pairs.json").read_text())

    def middle(task: str, key: str) -> float:
        return median(result[key] for result in found[task])

    first = found["epoch"][0]
    read = sum(map(len, first["packs"]))
    sizes = [file.stat().st_size for file in form.rglob("*") if file.is_file()]
    sizes += [file.stat().st_size for file in (form.parent / "tars").iterdir()] if with_tars else []
    prepared = f"{1000 * middle('prepare', 'seconds') / pairs:.2f}"
    if "seconds, header checked" in found["prepare"][0]:
        header = 1000 * middle("prepare", "seconds, header checked") / pairs
        prepared += f" ({header:.2f} with `--check header`)"
    return [
        *(way.described, prepared, f"{read / middle('epoch', 'seconds'):.1f}"),
        *(
            f"{first['tokens'] / (len(first['packs']) * first['length']):.2%}",
            str(pairs - len(_numbers(first["packs"]))),
        ),
        f"{middle('resume', 'seconds'):.2f} ({middle('resume', 'cpu_seconds'):.2f})",
        what_follows(first, found["resume"][0]["packs"]),
        *(f"{sum(sizes) / pairs:,.0f}", str(len(sizes)), f"{middle('epoch', 'memory') / 1e6:,.0f}"),
    ]


def what_follows(uninterrupted: dict[str, Any], resumed: list[list[int]]) -> str:
    """Compares the packs after resuming with those that would have followed."""
    packs, middle = uninterrupted["packs"], uninterrupted["middle"]
    before, after = packs[:middle], packs[middle:]
    if after == resumed:
        return "the same packs"
    lost = len(_numbers(after) - _numbers(resumed))
    again = sum(number in _numbers(before) for pack in resumed for number in pack)
    return f"other packs: {lost} pairs lost, {again} read again"
