"""Annotations -> shards. Each slice of records is one task and one shard, so the bytes do not depend on the workers."""

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from neo_megatron.data.annotations import Slice, slices
from neo_megatron.data.chat import load_tokenizer, special_ids, tokenizer_fingerprint
from neo_megatron.data.errors import DataError
from neo_megatron.data.files import REJECTS, WholeFile, finish_output, json_line, prepare_output
from neo_megatron.data.registry import Source
from neo_megatron.data.settings import Settings
from neo_megatron.data.shards import FORMAT, VERSION
from neo_megatron.data.slice_worker import Outcome, SliceWorker, Task


def preprocess(
    sources: Sequence[Source],
    tokenizer_directory: str | Path,
    output: str | Path,
    settings: Settings,
    on_error: Literal["skip", "fail"] = "skip",
    workers: int = 1,
) -> dict[str, Any]:
    """Writes the shards of all sources, ``rejects.jsonl`` and, last, the manifest, which is returned.

    Raises:
        DataError: for input that stops the run; with ``on_error="fail"`` that is the first sample that is rejected.
    """
    output = Path(output)
    tokenizer = load_tokenizer(tokenizer_directory)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    task = Task(sources, tokenizer_json, special_ids(tokenizer), settings, on_error, output)
    prepare_output(output, FORMAT)
    counts: Counter[str] = Counter(records_read=0, samples_read=0)
    reasons: Counter[str] = Counter()
    shards = []
    rejects = WholeFile(output / REJECTS)
    with contextlib.closing(_run(task, workers)) as outcomes:
        for outcome in outcomes:
            counts.update(records_read=outcome.records, samples_read=outcome.samples)
            reasons.update(reject["kind"] for reject in outcome.rejects)
            for reject in outcome.rejects:
                rejects.write(json_line(reject))
            if outcome.shard:
                shards.append(outcome.shard)
    rejects.commit()
    manifest = {
        "version": VERSION,
        "settings": asdict(settings),
        "tokenizer": {
            "sha256": tokenizer_fingerprint(tokenizer_json),
            "size": len(tokenizer),
            "ids": asdict(task.ids),
        },
        "sources": [asdict(source) | {"share": str(source.share)} for source in sources],
        "counts": {
            **counts,
            "samples_kept": sum(shard["samples"] for shard in shards),
            "samples_rejected": reasons.total(),
            "rejected_by_reason": dict(sorted(reasons.items())),
            "pictures": sum(shard["pictures"] for shard in shards),
        },
        "shards": shards,
    }
    finish_output(output, FORMAT, manifest)
    return manifest


def _run(task: Task, workers: int) -> Iterator[Outcome]:
    """The outcomes of all slices, in their order."""
    pieces = slices(task.sources, task.settings.records_per_shard)
    with tqdm(unit=" samples", desc="preprocess", mininterval=0.5) as bar:
        if workers == 1:
            yield from map(SliceWorker(task, bar.update).run, pieces)
        else:
            yield from _run_pool(task, workers, pieces, bar)


def _run_pool(task: Task, workers: int, pieces: Iterator[Slice], bar: tqdm) -> Iterator[Outcome]:
    context = get_context("spawn")  # a fork of a process with threads may hang
    done = context.Value("q", 0)
    futures: deque[Future[Outcome]] = deque()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task, done))
    try:
        for piece in pieces:
            futures.append(pool.submit(_run_slice, piece))
            if len(futures) >= 2 * workers:  # what is in flight bounds the memory
                yield _await(futures.popleft(), bar, done)
        while futures:
            yield _await(futures.popleft(), bar, done)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker was killed, most likely for want of memory; run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _await(future: "Future[Outcome]", bar: tqdm, done: Any) -> Outcome:
    while not future.done():
        wait([future], timeout=0.5)
        bar.update(done.value - bar.n)
    bar.update(done.value - bar.n)
    return future.result()


_worker: SliceWorker  # of this process, where it is one of the pool


def _start_worker(task: Task, done: Any) -> None:
    global _worker

    def report(count: int) -> None:
        with done.get_lock():
            done.value += count

    _worker = SliceWorker(task, report)


def _run_slice(piece: Slice) -> Outcome:
    return _worker.run(piece)
