"""Turns one slice of records into one shard: reads, checks, loads images, tokenizes in batches, writes."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from neo_megatron.data.chat import ChatEncoder, SpecialIds
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.image import image_tokens
from neo_megatron.data.prepare.annotation_slices import Slice, read_slice, rejected_rest
from neo_megatron.data.prepare.checked_samples import Checked, checked_samples, images_ahead
from neo_megatron.data.prepare.file_identity import identity_of_texts
from neo_megatron.data.prepare.media import Media, read_media
from neo_megatron.data.prepare.output import ShardOutput
from neo_megatron.data.prepare.records import check_answers
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.resume import Outcome, without_details
from neo_megatron.data.prepare.schemas.convert import Converter
from neo_megatron.data.prepare.schemas.documents import Piece, is_document, split_document
from neo_megatron.data.rejects import place_of
from neo_megatron.data.shards.writer import ShardWriter
from neo_megatron.errors import DataError, RejectedSample

# Samples are tokenized together until their images hold this much memory.
_BATCH_SAMPLES, _BATCH_BYTES = 256, 64 << 20


@dataclass(frozen=True)
class Task:
    """All that a worker needs in addition to its slices; sent to it once."""

    sources: Sequence[Source]
    tokenizer_json: str
    ids: SpecialIds
    settings: PreprocessConfig
    on_error: Literal["skip", "fail"]
    output: ShardOutput


@dataclass
class _Pending:
    """A checked sample with its media, waiting to be tokenized with others."""

    media: Media
    record: int
    ends_record: bool = False


class _Batch:
    """Samples on their way into a shard, tokenized many at a time."""

    def __init__(
        self, encoder: ChatEncoder, writer: ShardWriter, source: int, document_tokens: int, image_start: int
    ) -> None:
        self._encoder, self._writer, self._source = encoder, writer, source
        self._document_tokens, self._image_start = document_tokens, image_start
        self._samples: list[_Pending] = []
        self._bytes = 0
        # Samples in addition to those that were added, from documents that were split; those of them with images.
        self.further = self.further_with_images = 0
        self._in_record = False  # whether a sample has come since the last record ended

    @property
    def is_empty(self) -> bool:
        """Whether all samples have been written."""
        return not self._samples

    def add(self, sample: _Pending) -> None:
        """Adds a sample, and writes all once they are many or large."""
        self._in_record = True
        self._samples.append(sample)
        self._bytes += sum(image.nbytes for image in sample.media.images)
        if len(self._samples) >= _BATCH_SAMPLES or self._bytes >= _BATCH_BYTES:
            self.write()

    def end_record(self) -> None:
        """Ends the record of the samples since the last call."""
        if self._in_record and self._samples:
            self._samples[-1].ends_record = True
        elif self._in_record:
            self._writer.end_record()
        self._in_record = False

    def write(self) -> None:
        """Hands all samples to the writer."""
        media = [sample.media for sample in self._samples]
        counts = [image_tokens(np.array(item.grids, np.int64).reshape(-1, 2)).tolist() for item in media]
        tokenized = self._encoder.encode([(item.turns, n) for item, n in zip(media, counts, strict=True)])
        for sample, tokens in zip(self._samples, tokenized, strict=True):
            item = sample.media
            key = identity_of_texts(turn.text for turn in item.turns)
            pieces = [Piece(tokens, slice(None))]
            if is_document(item.turns) and len(tokens.tokens) > self._document_tokens:
                pieces = split_document(tokens, self._image_start, self._document_tokens)
            self.further += len(pieces) - 1
            self.further_with_images += sum(bool(item.images[part]) for _, part in pieces) - bool(item.images)
            for piece, part in pieces:
                images, grids, files = item.images[part], item.grids[part], item.files(part)
                self._writer.add(piece, images, grids, self._source, sample.record, key, files)
            if sample.ends_record:
                self._writer.end_record()
        self._samples, self._bytes = [], 0


class _Reported:
    """The samples and bytes of a slice that have been reported."""

    def __init__(self) -> None:
        self._samples = self._bytes = 0

    def since(self, samples: int, size: int) -> tuple[int, int]:
        """(samples, bytes) since the last call, given both since the start."""
        new = samples - self._samples, size - self._bytes
        self._samples, self._bytes = samples, size
        return new


class SliceWorker:
    """Turns slices into shards."""

    def __init__(self, task: Task, report: Callable[[int, int], Any] = lambda samples, size: None) -> None:
        """``report`` is called now and then with the samples and bytes of annotations read since its last call."""
        self._task = task
        self._report = report
        self._encoder = ChatEncoder(task.tokenizer_json, task.ids, task.settings.chat_layout)

    def run(self, piece: Slice) -> Outcome:
        """Writes the shard of a slice and then its outcome, which is returned without its details.

        Raises:
            DataError: a sample was rejected and the task is to fail then; the disk is full.
        """
        with self._task.output.room() as room:
            writer = ShardWriter(room, piece.place.number)
            try:
                with warnings.catch_warnings():
                    # An image is either rejected with a reason or used; Pillow's warnings would hide the progress bar.
                    warnings.filterwarnings("ignore", module=r"PIL\.")
                    outcome = self._run(piece, writer)
            except BaseException:
                writer.discard()
                raise
            self._task.output.save(room, outcome)
        return without_details(outcome)

    def _run(self, piece: Slice, writer: ShardWriter) -> Outcome:
        source = self._task.sources[piece.place.source]
        outcome = Outcome(piece.next, piece.bytes_to(piece.end))
        reported = _Reported()
        document_tokens, image_start = source.schema.max_document_tokens, self._task.ids.image_start
        batch = _Batch(self._encoder, writer, piece.place.source, document_tokens, image_start)
        converter = Converter(source, self._task.settings.seed)
        settings = source.settings(self._task.settings)
        records = read_slice(piece, source, settings.seed)
        checked = (
            (record, checked_samples(read, record, source, converter, settings.chat_layout)) for record, read in records
        )
        for record, samples in images_ahead(checked, source):
            outcome.records += 1
            self._add_record(samples, record, source, settings, batch, outcome)
            if batch.is_empty:
                end = int(piece.bounds[record - piece.place.first, 1])
                self._report(*reported.since(outcome.samples, piece.bytes_to(end)))
        batch.write()
        outcome.samples += batch.further
        outcome.noticed.with_images += batch.further_with_images
        if piece.broken:
            outcome.records += 1
            outcome.samples += 1
            self._reject(rejected_rest(piece, source), piece.place.first + len(piece.bounds), None, source, outcome)
        if outcome.samples > len(outcome.rejects):
            outcome.shard = writer.commit()
        else:
            writer.discard()
        self._report(*reported.since(outcome.samples, outcome.bytes))
        return outcome

    def _add_record(
        self,
        samples: Sequence[Checked],
        record: int,
        source: Source,
        settings: PreprocessConfig,
        batch: _Batch,
        outcome: Outcome,
    ) -> None:
        """Adds the usable samples of a record to the batch, and rejects the others."""
        for element, written, sample in samples:
            outcome.samples += 1
            try:
                if isinstance(sample, RejectedSample):
                    raise sample
                if settings.empty_answers == "reject":
                    check_answers(sample)
                media = read_media(sample, settings)
            except RejectedSample as rejected:
                self._reject(rejected, record, element, source, outcome)
            else:
                place = {"file": source.annotations, "record": record, "element": element}
                outcome.noticed.note(sample, written, media.images, place)
                batch.add(_Pending(media, record))
        batch.end_record()

    def _reject(
        self, rejected: RejectedSample, record: int, element: int | None, source: Source, outcome: Outcome
    ) -> None:
        if self._task.on_error == "fail":
            where = place_of(source.annotations, record, element)
            raise DataError(f"{where}: {rejected.sentence}; correct it, or leave it out with --on-error skip")
        outcome.rejects.append(rejected.row(source.annotations, record, element))
