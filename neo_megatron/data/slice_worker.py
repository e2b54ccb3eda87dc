"""One slice of records -> one shard: reads, checks, loads pictures, tokenizes in batches, writes."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neo_megatron.data.annotations import Slice, read_slice
from neo_megatron.data.chat import ChatEncoder, SpecialIds
from neo_megatron.data.errors import DataError, Reason, RejectedSample
from neo_megatron.data.media import load_media
from neo_megatron.data.records import Sample, check_sample, parse_record, split_key
from neo_megatron.data.registry import Source
from neo_megatron.data.settings import Settings
from neo_megatron.data.shard_writer import ShardWriter

# Samples are tokenized together until their pictures hold this much memory.
_BATCH_SAMPLES, _BATCH_BYTES = 256, 64 << 20


@dataclass(frozen=True)
class Task:
    """All that a worker needs besides its slice; sent to it once."""

    sources: Sequence[Source]
    tokenizer_json: str
    ids: SpecialIds
    settings: Settings
    on_error: Literal["skip", "fail"]
    output: Path


@dataclass
class Outcome:
    """What a slice became: its manifest entry (``None`` when nothing was kept), its rejects, and how much was read."""

    shard: dict[str, Any] | None = None
    records: int = 0
    samples: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Pending:
    """A checked sample with its pictures, waiting to be tokenized with others."""

    sample: Sample
    pictures: list[np.ndarray]
    grids: list[tuple[int, int]]
    record: int
    key: int
    ends_record: bool = False


class SliceWorker:
    """Turns slices into shards."""

    def __init__(self, task: Task, report: Callable[[int], Any]) -> None:
        self._task = task
        self._report = report
        self._encoder = ChatEncoder(task.tokenizer_json, task.ids)

    def run(self, piece: Slice) -> Outcome:
        """Writes the shard of a slice.

        Raises:
            DataError: for the first rejected sample, where the task says so.
        """
        with warnings.catch_warnings():
            # A picture is either rejected with a reason or used; what Pillow says beside that would hide the progress.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return self._run(piece)

    def _run(self, piece: Slice) -> Outcome:
        source = self._task.sources[piece.source]
        outcome = Outcome()
        writer = ShardWriter(self._task.output, piece.number)
        batch: list[_Pending] = []
        size = 0
        for record, line in read_slice(piece, source, self._task.settings.seed):
            outcome.records += 1
            samples = self._read_record(line, record, source, outcome)
            batch += samples
            size += sum(picture.nbytes for pending in samples for picture in pending.pictures)
            if len(batch) >= _BATCH_SAMPLES or size >= _BATCH_BYTES:
                self._write(batch, writer, piece.source)
                batch, size = [], 0
        self._write(batch, writer, piece.source)
        if piece.broken:
            outcome.records += 1
            outcome.samples += 1
            self._reject(
                RejectedSample(Reason.BROKEN_JSON, piece.broken), piece.first + piece.count, None, source, outcome
            )
        if outcome.samples > len(outcome.rejects):
            outcome.shard = writer.commit()
        else:
            writer.discard()
        return outcome

    def _read_record(self, line: bytes | None, record: int, source: Source, outcome: Outcome) -> list[_Pending]:
        """The usable samples of a record; the others are noted in the outcome."""
        kept: list[_Pending] = []
        element: int | None = None
        try:
            elements = list(parse_record(line))
        except RejectedSample as rejected:
            outcome.samples += 1
            self._reject(rejected, record, None, source, outcome)
            return kept
        key = split_key([written for _, written in elements])
        for element, written in elements:
            outcome.samples += 1
            try:
                sample = check_sample(written, source)
                pictures, grids = load_media(sample, self._task.settings)
            except RejectedSample as rejected:
                self._reject(rejected, record, element, source, outcome)
            else:
                kept.append(_Pending(sample, pictures, grids, record, key))
        if kept:
            kept[-1].ends_record = True
        return kept

    def _write(self, batch: list[_Pending], writer: ShardWriter, source: int) -> None:
        cells = [[height * width // 4 for height, width in pending.grids] for pending in batch]
        tokenized = self._encoder.encode([(item.sample.turns, n) for item, n in zip(batch, cells, strict=True)])
        for pending, tokens in zip(batch, tokenized, strict=True):
            writer.add(tokens, pending.pictures, pending.grids, source, pending.record, pending.key)
            if pending.ends_record:
                writer.end_record()
        self._report(len(batch))

    def _reject(
        self, rejected: RejectedSample, record: int, element: int | None, source: Source, outcome: Outcome
    ) -> None:
        if self._task.on_error == "fail":
            where = f"record {record}" if element is None else f"record {record}, sample {element}"
            raise DataError(
                f"{source.annotations}, {where}: {rejected.sentence}; correct it, or leave it out with --on-error skip"
            )
        outcome.rejects.append(
            {
                "file": source.annotations,
                "record": record,
                "element": element,
                "kind": rejected.reason.value,
                "reason": rejected.sentence,
            }
        )
        self._report(1)
