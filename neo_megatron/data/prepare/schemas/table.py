"""The table of schemas, and the options that fit each of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neo_megatron.data.prepare.schemas import caption, interleaved, messages, neo, text
from neo_megatron.data.prepare.schemas.fields import Fields, Origin
from neo_megatron.data.prepare.schemas.options import AUTO, NEO, SchemaOptions
from neo_megatron.errors import DataError

Convert = Callable[[Fields, SchemaOptions, Origin], dict[str, Any]]


@dataclass(frozen=True)
class Schema:
    """A form of records.

    Args:
        convert: turns a raw record into the published form, or raises RejectedSample.
        claims: whether a raw record looks like this form.
        fields: which ``columns`` may give another key.
        has_users: whether records have turns of users, in which a placeholder may stand.
    """

    convert: Convert
    claims: Callable[[Mapping[str, Any]], bool]
    fields: tuple[str, ...]
    has_users: bool = False


SCHEMAS = {
    NEO: Schema(neo.convert, lambda record: "conversations" in record, neo.FIELDS, has_users=True),
    "messages": Schema(messages.convert, messages.claims, messages.FIELDS, has_users=True),
    "caption": Schema(caption.convert, caption.claims, caption.FIELDS),
    "interleaved": Schema(interleaved.convert, interleaved.claims, interleaved.FIELDS),
    "text": Schema(text.convert, text.claims, text.FIELDS),
}


def check_options(options: SchemaOptions, where: str) -> None:
    """Checks that the options of a data set fit its schema.

    Args:
        where: the data set, for messages.

    Raises:
        DataError: the text says which option does not.
    """
    if options.name == AUTO:
        if options.columns:
            raise DataError(
                f"{where}: columns go with a schema of your choice; give --schema too (in a registry: schema), one of "
                f"{', '.join(SCHEMAS)}"
            )
        return
    if options.name not in SCHEMAS:
        raise DataError(f"{where}: the schema {options.name} is not known; choose one of {', '.join(SCHEMAS)}")
    schema = SCHEMAS[options.name]
    for ours, _ in options.columns:
        if ours not in schema.fields:
            raise DataError(
                f"{where}: columns name {ours!r}, which the schema {options.name} does not have; it has "
                f"{', '.join(schema.fields)}"
            )
    if options.image_placeholder and not schema.has_users:
        raise DataError(
            f"{where}: an image placeholder goes with the schemas {NEO} and messages; the schema {options.name} takes "
            "text as it is, so leave the placeholder out"
        )


def published_form(record: dict[str, Any], options: SchemaOptions, origin: Origin) -> dict[str, Any]:
    """A raw record in the published form.

    Raises:
        RejectedSample: it is not a record of the schema.
    """
    return SCHEMAS[options.name].convert(Fields(record, options.columns), options, origin)
