"""One measurement in a process of its own: `python -m neo_megatron.benchmarks.peers.child TASK WAY DIRECTORY`.

The directory has the tars in ``tars``, the tokenizer in ``tokenizer`` and ``tokenizer.json`` of `Work.write`; the
prepared form is written to ``WAY``, and the state in the middle of the epoch to ``WAY.state``. Prints JSON.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from neo_megatron.benchmarks.peers.ways import OURS, WAYS, Way
from neo_megatron.benchmarks.peers.work import Loader, Work


def cpu() -> float:
    """CPU seconds of this process, all its threads, and of processes that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def memory() -> int:
    """Memory of this process in bytes, without mapped files, which the system keeps in memory as long as it likes."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def prepare(way: Way, name: str, root: Path, work: Work) -> dict[str, Any]:
    """CPU seconds of preparing the tars."""
    form = root / name
    if name in OURS:
        return _prepare_ours(name, root, form, work)
    shutil.rmtree(form, ignore_errors=True)
    prepare_peer = way.preparation()
    start = cpu()
    prepare_peer(root / "tars", form)
    return {"seconds": cpu() - start}


def _prepare_ours(store: str, root: Path, form: Path, work: Work) -> dict[str, Any]:
    """CPU seconds without starting processes and reading the tokenizer, with images decoded as a check, and not."""
    from neo_megatron.benchmarks.peers import ours

    if not form.exists():
        ours.prepare(root / "tars", form, root / "tokenizer", work.length, store)
    packing = cpu()
    ours.pack(form / "shards", root / "packed", work.length)
    packing = cpu() - packing
    shutil.rmtree(root / "packed")
    found: dict[str, Any] = {}
    checks = {"seconds": "decode", "seconds, header checked": "header"}
    if store == "patches":  # decodes in any case
        del checks["seconds, header checked"]
    for kind, check in checks.items():
        alone = root / f"{store}.alone"
        alone.mkdir()
        start = cpu()
        ours.preprocess_alone(root / "tars", alone, work, store, check)
        found[kind] = cpu() - start + packing
        shutil.rmtree(alone)
    return found


def numbers_of(loader: Loader, pack: dict[str, Any]) -> list[int]:
    """Numbers of the pairs of the last pack."""
    return pack["numbers"] if "numbers" in pack else loader.numbers()


def epoch(way: Way, name: str, root: Path, work: Work) -> dict[str, Any]:
    """CPU seconds and contents of an epoch, whose state is saved once half of the pairs were read."""
    pairs = json.loads((root / "pairs.json").read_text())
    before, start = memory(), cpu()
    loader = way.open(root / name, work)
    packs = iter(loader)
    seconds = cpu() - start
    contents: list[list[int]] = []
    middle, tokens, checksum, most = 0, 0, 0, 0
    while True:
        start = cpu()
        pack = next(packs, None)
        seconds += cpu() - start
        if pack is None:
            break
        most = max(most, memory())
        contents.append(numbers_of(loader, pack))
        real = pack["document"].flatten() >= 0
        tokens += int(real.sum())
        checksum += int(pack["tokens"].flatten()[real].sum()) + int(pack["patches"].sum(dtype=torch.int64))
        if not middle and sum(map(len, contents)) >= pairs // 2:
            middle = len(contents)
            loader.save(root / f"{name}.state")
            (root / f"{name}.rest").unlink(missing_ok=True)
    return {
        **{"seconds": seconds, "packs": contents, "middle": middle, "tokens": tokens, "checksum": checksum},
        **{"memory": most - before, "length": work.length},
    }


def resume(way: Way, name: str, root: Path, work: Work) -> dict[str, Any]:
    """Time from opening the data set to the first pack after the saved state, and the packs from there on.

    They are read once, not again by further repetitions.
    """
    start, start_cpu = time.perf_counter(), cpu()
    loader = way.open(root / name, work)
    loader.restore(root / f"{name}.state")
    packs = iter(loader)
    contents = [numbers_of(loader, next(packs))]
    seconds, cpu_seconds = time.perf_counter() - start, cpu() - start_cpu
    rest = root / f"{name}.rest"
    if not rest.exists():
        contents += [numbers_of(loader, pack) for pack in packs]
        rest.write_text(json.dumps(contents))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "packs": json.loads(rest.read_text())}


def main() -> None:
    """Runs a task and prints what it returns."""
    task, name, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    way, work = WAYS[name], Work(root / "tokenizer.json")
    way.load()
    measured = {"prepare": prepare, "epoch": epoch, "resume": resume}[task](way, name, root, work)
    print(json.dumps(measured), file=sys.__stdout__)


if __name__ == "__main__":
    main()
