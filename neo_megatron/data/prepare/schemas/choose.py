"""Chooses the schema of each data set: the one that was asked for, or the one that its first records have."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.records import parse_record
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.options import AUTO, NEO, SchemaOptions
from neo_megatron.data.prepare.schemas.table import SCHEMAS, check_options
from neo_megatron.data.prepare.schemas.transform import source_sha256
from neo_megatron.errors import DataError, RejectedSample

_FIRST_RECORDS = 16


def choose_schemas(sources: Sequence[Source], to_answer: bool = False) -> list[Source]:
    """The sources with the schemas by which they are read; none of them is "auto" any more.

    Args:
        sources: all files of a data set have its name, and are read by the schema of the first.
        to_answer: whether a model is to answer the records, which may have a ``prompt`` in place of ``conversations``.

    Raises:
        DataError: the first records of a data set could be of several schemas, an option does not fit its schema, or
            there are prompts for captions but no data set of captions.
    """
    options: dict[tuple[str, SchemaOptions], SchemaOptions] = {}
    for source in sources:
        key = source.name, source.schema
        options[key] = options.get(key) or _chosen(source, to_answer)
    found = [replace(source, schema=options[source.name, source.schema]) for source in sources]
    if any(source.schema.prompts for source in sources) and not any(source.schema.prompts for source in found):
        named = ", ".join(f"{source.name} has the schema {source.schema.name}" for source in found)
        raise DataError(f"--caption-prompts goes with the schema caption, but {named}; leave it out")
    return found


def schema_line(source: Source, asked: Source) -> str:
    """A line for the log: the schema of a data set, and whether it was ``asked`` for."""
    if source.schema.transform:
        return f"data set {source.name}: records of {source.schema.transform}"
    recognised = ", recognised from its first records" if asked.schema.name == AUTO else ""
    return f"data set {source.name}: schema {source.schema.name}{recognised}"


def _chosen(source: Source, to_answer: bool) -> SchemaOptions:
    options, where = source.schema, f"data set {source.name}"
    check_options(options, where)
    if options.transform:
        options = replace(options, name=NEO, transform_sha256=source_sha256(options.transform))
    elif options.name == AUTO:
        options = replace(options, name=_recognised(source, to_answer))
    if options.name != "caption":
        options = replace(options, prompts=())
    check_options(options, where)
    return options


def _recognised(source: Source, to_answer: bool) -> str:
    """The schema of the first records; the published form if they have none, so that its messages say what is wrong."""
    records = list(_first_records(source))
    if to_answer and any("prompt" in record for record in records):
        return NEO
    claims = [found for record in records if (found := _claims(record))]
    if not claims or any(NEO in found for found in claims):
        return NEO
    common = set.intersection(*claims)
    if len(common) == 1:
        return common.pop()
    named = " or ".join(name for name in SCHEMAS if any(name in found for found in claims))
    raise DataError(
        f"data set {source.name}: the first records of {source.annotations} could be of the schema {named}; choose one "
        "with --schema (in a registry: schema)"
    )


def _claims(record: dict[str, Any]) -> set[str]:
    return {name for name, schema in SCHEMAS.items() if schema.claims(record)}


def _first_records(source: Source) -> Iterator[dict[str, Any]]:
    """The first samples that are objects; what cannot be read is rejected later, with its reason."""
    complete = replace(source, share=Fraction(1))
    piece = next(slices([complete], _FIRST_RECORDS), None)
    for _, text in read_slice(piece, complete, seed=0) if piece else ():
        try:
            elements = list(parse_record(text))
        except RejectedSample:
            continue
        yield from (sample for _, sample in elements if isinstance(sample, dict))
