"""Turns annotations into shards: each slice of records is one task and one shard, whatever the number of workers."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from neo_megatron.atomic_files import AtomicFile, json_line
from neo_megatron.data.chat import tokenizer_fingerprint
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.manifest import REJECTS, read_manifest, write_manifest
from neo_megatron.data.prepare.annotation_slices import Place, Slice, slices
from neo_megatron.data.prepare.bounds_ahead import BoundsAhead
from neo_megatron.data.prepare.executors import ExecutorName, open_executor
from neo_megatron.data.prepare.output import ShardOutput, open_output
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.remote_run import RemoteRun
from neo_megatron.data.prepare.resume import Run, without_details
from neo_megatron.data.prepare.schemas.choose import choose_schemas
from neo_megatron.data.prepare.tallies import Noticed
from neo_megatron.data.prepare.worker import Task
from neo_megatron.data.shards.reader import FORMAT, VERSION
from neo_megatron.data.tokenizer_process import load_parts
from neo_megatron.errors import Reason, TooManyRejected
from neo_megatron.storage.base import MANIFEST, is_remote, join
from neo_megatron.storage.open import concurrently, source_state
from neo_megatron.storage.source_files import SourceState
from neo_megatron.worker_pool import in_order

_NOT_FOUND = (Reason.MISSING_IMAGE, Reason.MISSING_VIDEO, Reason.OUTSIDE_ROOT)


def preprocess(
    sources: Sequence[Source],
    tokenizer_directory: str | Path,
    output: str | Path,
    settings: PreprocessConfig,
    on_error: Literal["skip", "fail"] = "skip",
    workers: int = 1,
    engine: ExecutorName = "local",
    max_rejected: float = 100.0,
) -> dict[str, Any]:
    """Writes the shards of all sources, ``rejects.jsonl`` and, last, the manifest, which is returned.

    The same call continues an interrupted run; the result has the same bytes. Several workers of the engine "local"
    are processes that import the main module: a script needs its ``if __name__ == "__main__"``.

    Args:
        sources: annotation files, in order.
        tokenizer_directory: with a Hugging Face tokenizer.
        output: a new directory, or that of an unfinished run; or an address of object storage.
        settings: see `PreprocessConfig`.
        on_error: "skip" lists a rejected sample, "fail" stops at the first.
        workers: processes, or tasks in flight on Ray.
        engine: "local" or "ray".
        max_rejected: percent of the samples read that may be rejected, from 0 to 100.

    Raises:
        TooManyRejected: more samples were rejected. Shards and ``rejects.jsonl`` are complete, but without a manifest,
            so they cannot be packed; the same call with a higher limit completes them at once.
        DataError: the input cannot be read, or a sample was rejected with ``on_error="fail"``.
    """
    place = open_output(output)
    for source in sources:
        source.settings(settings)  # raises if they do not fit, before any work
    sources = choose_schemas(sources)
    with open_run(output) as run:
        tokenizer = load_parts(tokenizer_directory)
        head = {
            "version": VERSION,
            "settings": asdict(settings),
            "tokenizer": {
                "sha256": tokenizer_fingerprint(tokenizer.json),
                "size": tokenizer.size,
                "ids": asdict(tokenizer.ids),
            },
            "sources": [_entry(source) for source in sources],
        }
        run.begin(_plan(head))
        if not run.has_manifest:
            task = Task(sources, tokenizer.json, tokenizer.ids, settings, on_error, place)
            count = _run_slices(run, task, workers, engine)
            _join_outcomes(place, count, head, max_rejected)
        run.clear()
    return read_manifest(output, FORMAT, VERSION)


def _entry(source: Source) -> dict[str, Any]:
    """The entry of a source in a manifest."""
    entry = asdict(source) | {"share": str(source.share)}
    del entry["schema"], entry["media"], entry["version"]
    return entry | source.schema.entry() | source.media.entry()


def _plan(head: dict[str, Any]) -> dict[str, Any]:
    """All that decides the bytes of the data set, except for the images."""
    entries = [state.entry() for state in _states([source["annotations"] for source in head["sources"]])]
    return head | {"sources": [source | entry for source, entry in zip(head["sources"], entries, strict=True)]}


def _states(files: Sequence[str]) -> list[SourceState]:
    return concurrently(source_state, files)


def _run_slices(run: Run | RemoteRun, task: Task, workers: int, engine: ExecutorName) -> int:
    """Runs the slices that have no outcome yet; returns the number of all slices."""
    # A run that stops at the first rejected sample has to read those again that an earlier run skipped.
    done = {
        outcome.number: without_details(outcome)
        for outcome in run.outcomes()
        if task.on_error == "skip" or not outcome.rejects
    }
    run.keep(done)
    place = Place()
    while place.number in done:
        place = done[place.number].next
    count = place.number
    ahead = BoundsAhead(task.sources, workers)

    def missing() -> Iterator[Slice]:
        nonlocal count
        for piece in slices(task.sources, task.settings.records_per_shard, place, ahead.of):
            count += 1
            if piece.place.number not in done:
                yield piece

    with _Progress(task.sources, sum(outcome.bytes for outcome in done.values())) as progress:
        executor = open_executor(engine, task, workers, progress.add)
        with contextlib.closing(executor), contextlib.closing(ahead):
            for _ in in_order(executor, missing()):
                pass
    return count


def open_run(output: str | Path) -> Run | RemoteRun:
    """The run that writes to a path or an address."""
    return RemoteRun(str(output)) if is_remote(output) else Run(Path(output))


def _join_outcomes(output: ShardOutput, count: int, head: dict[str, Any], max_rejected: float) -> None:
    """Writes the list of rejected samples and, if they are not too many, the manifest from the outcomes of slices."""
    with output.room() as room:
        files, totals, shards, first = _collect(output, room, count)
        output.publish(room, REJECTS)
        if totals["samples_rejected"] * 100 > max_rejected * totals["samples_read"]:
            raise TooManyRejected(_too_many(totals, max_rejected, join(output.location, REJECTS), first), totals)
        write_manifest(room, {"format": FORMAT, **head, "counts": totals, "shards": shards, "files": files})
        output.publish(room, MANIFEST)


def _collect(
    output: ShardOutput, room: Path, count: int
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Writes the list of rejected samples.

    Returns:
        The entry of its file, the counts and the entries of the shards for the manifest, and the first rejected sample
        of each kind.
    """
    counts: Counter[str] = Counter(records_read=0, samples_read=0)
    reasons: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    first: dict[str, dict[str, Any]] = {}
    noticed = Noticed()
    rejects = AtomicFile(room / REJECTS)
    for outcome in output.load(range(count)):
        counts.update(records_read=outcome.records, samples_read=outcome.samples)
        reasons.update(reject["kind"] for reject in outcome.rejects)
        noticed.add(outcome.noticed)
        for reject in outcome.rejects:
            rejects.write(json_line(reject))
            first.setdefault(reject["kind"], reject)
        if outcome.shard:
            shards.append(outcome.shard)
    files = {REJECTS: rejects.commit()}
    totals = {
        **counts,
        "samples_kept": sum(shard["samples"] for shard in shards),
        "samples_rejected": reasons.total(),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "pictures": sum(shard["pictures"] for shard in shards),
        **noticed.counts(),
    }
    return files, totals, shards, first


def _too_many(counts: dict[str, Any], limit: float, listed: str, first: dict[str, dict[str, Any]]) -> str:
    """The message for a run with too many rejected samples; ``first`` is the first of each kind."""
    rejected, read = counts["samples_rejected"], counts["samples_read"]
    not_found = [kind for kind in _NOT_FOUND if kind in first]
    lost = sum(counts["rejected_by_reason"][kind] for kind in not_found)
    hint = ""
    if 2 * lost > rejected:
        entry = min((first[kind] for kind in not_found), key=lambda entry: entry["record"])
        hint = (
            f"{lost} of them name an image or video that is not found, so check --image-root (in a registry: "
            f"data_path); the first is record {entry['record']} of {entry['file']}: {entry['reason']}; "
        )
    return (
        f"{rejected} of {read} samples ({rejected / read:.2%}) were rejected, more than --max-rejected {limit:g} "
        f"(percent) allows; {listed} has the reason for each; {hint}nothing can be packed yet: correct the cause and "
        "preprocess into a new --output, or run the same command with a higher --max-rejected, which only writes the "
        "manifest"
    )


class _Progress(tqdm):
    """A progress bar over the bytes of the annotation files, with the samples per second of this run."""

    def __init__(self, sources: Sequence[Source], done: int) -> None:
        super().__init__(
            desc="preprocess",
            total=sum(state.size for state in _states([source.annotations for source in sources])),
            initial=done,
            unit="B",
            unit_scale=True,
            mininterval=0.5,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} of annotations [{elapsed}<{remaining}{postfix}]",
        )
        self._samples, self._start = 0, time.monotonic()

    def add(self, samples: int, size: int) -> None:
        self._samples += samples
        rate = self._samples / (time.monotonic() - self._start)
        self.set_postfix_str(f"{rate:,.0f} samples/s", refresh=False)
        self.update(size)
