"""Checks the samples of records, some records before their images are read: objects are requested together."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from neo_megatron.data.config import ChatLayout
from neo_megatron.data.prepare.record_files import Record
from neo_megatron.data.prepare.records import Sample, check_sample, parse_record
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.convert import Converter
from neo_megatron.errors import RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import read_ahead

# Images that are requested in advance, from at most this number of records.
_IMAGES, _RECORDS = 48, 256


class Checked(NamedTuple):
    """A sample of a record.

    Args:
        element: its number in a list-packed record, ``None`` for any other record.
        written: in the published form.
        sample: that was checked, or why it is rejected.
    """

    element: int | None
    written: Any
    sample: Sample | RejectedSample


def checked_samples(
    read: Record,
    record: int,
    source: Source,
    converter: Converter,
    layout: ChatLayout,
    complete: Callable[[Any], Any] = lambda it: it,
) -> list[Checked]:
    """The samples of record number ``record``; a record that cannot be read is one rejected sample.

    Args:
        read: the record.
        record: its number in the file.
        source: of the record.
        converter: of the source.
        layout: of conversations.
        complete: is called with each sample, and returns the one that is checked, or raises RejectedSample.
    """
    try:
        elements = list(converter.samples(parse_record(read), record))
    except RejectedSample as rejected:
        return [Checked(None, None, rejected)]
    return [Checked(element, written, _checked(written, source, layout, complete)) for element, written in elements]


def _checked(
    written: Any, source: Source, layout: ChatLayout, complete: Callable[[Any], Any]
) -> Sample | RejectedSample:
    if isinstance(written, RejectedSample):
        return written
    try:
        return check_sample(complete(written), source, layout)
    except RejectedSample as rejected:
        return rejected


def images_ahead(records: Iterable[tuple[int, list[Checked]]], source: Source) -> Iterator[tuple[int, list[Checked]]]:
    """The records, in order; where images lie in object storage, those of the next records are requested already."""
    if not is_remote(source.image_root) and not is_remote(source.annotations):
        yield from records
        return
    waiting: deque[tuple[int, list[Checked], list[str]]] = deque()
    images = 0
    for record, samples in records:
        addresses = [
            image
            for _, _, sample in samples
            if isinstance(sample, Sample)
            for image in sample.images
            if isinstance(image, str) and is_remote(image)
        ]
        read_ahead(addresses)
        waiting.append((record, samples, addresses))
        images += len(addresses)
        while waiting and (not images or images > _IMAGES or len(waiting) > _RECORDS):
            record, samples, addresses = waiting.popleft()
            images -= len(addresses)
            yield record, samples
    for record, samples, _ in waiting:
        yield record, samples
