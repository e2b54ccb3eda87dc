"""Turns the samples of raw records into the published form, as the schema or transform of their data set says."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.fields import Origin
from neo_megatron.data.prepare.schemas.options import AUTO, NEO
from neo_megatron.data.prepare.schemas.table import published_form
from neo_megatron.data.prepare.schemas.transform import load_transform, transformed
from neo_megatron.errors import RejectedSample


class Converter:
    """Converts the samples of one data set.

    Args:
        source: with its schema, see `choose_schemas`; where none was chosen, records are of the published form.
        seed: of the run, for prompts.

    Raises:
        DataError: the transform cannot be loaded.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self._place = seed, source.name, os.path.basename(source.annotations)
        self._options = source.schema
        self._function: Callable[[Any], Any] | None = None
        if self._options.transform:
            self._function = load_transform(self._options.transform, self._options.transform_sha256)

    def samples(
        self, elements: Iterable[tuple[int | None, Any]], record: int
    ) -> Iterator[tuple[int | None, Any | RejectedSample]]:
        """(element, sample in the published form, or why it is rejected) of each sample of a raw record.

        Args:
            elements: (element, sample as written) of the record.
            record: its number in the file.
        """
        if self._function is not None:
            yield from self._transformed(list(elements))
            return
        for element, written in elements:
            yield element, self._converted(written, Origin(*self._place, record, element))

    def _converted(self, written: Any, origin: Origin) -> Any | RejectedSample:
        if self._is_published or not isinstance(written, dict):  # which `check_sample` rejects
            return written
        try:
            return published_form(written, self._options, origin)
        except RejectedSample as rejected:
            return rejected

    @property
    def _is_published(self) -> bool:
        return self._options.name in (AUTO, NEO) and not self._options.columns and not self._options.image_placeholder

    def _transformed(self, elements: list[tuple[int | None, Any]]) -> Iterator[tuple[int | None, Any | RejectedSample]]:
        assert self._function is not None
        made: list[Any | RejectedSample] = []
        for _, written in elements:
            try:
                made += transformed(self._function, self._options.transform, written)
            except RejectedSample as rejected:
                made.append(rejected)
        alone = len(made) == 1 and elements[0][0] is None
        yield from ((None if alone else number, sample) for number, sample in enumerate(made))
