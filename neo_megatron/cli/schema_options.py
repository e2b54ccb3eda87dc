"""Options for the form of records: schema, columns, placeholder, transform, prompts and the length of documents."""

import argparse
from collections.abc import Sequence
from typing import Any

from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.choose import choose_schemas, schema_line
from neo_megatron.data.prepare.schemas.options import AUTO, MAX_DOCUMENT_TOKENS, SchemaOptions, read_prompts
from neo_megatron.data.prepare.schemas.table import SCHEMAS

# Of one data set, which has them in a registry; the others are those of all data sets.
_OF_ONE = {"schema": AUTO, "columns": (), "image_placeholder": "", "transform": ""}
_SHARED = {"caption_prompts": "", "max_document_tokens": MAX_DOCUMENT_TOKENS}


def add_schemas(parser: argparse.ArgumentParser) -> None:
    """Adds the options, all of which have a default."""
    group = parser.add_argument_group("form of the records (docs/data.md, Schemas)")
    group.add_argument(
        "--schema",
        choices=[AUTO, *SCHEMAS],
        default=AUTO,
        help="form of the records of --input; auto recognises it from the first 16 and prints it (%(default)s)",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        type=_column,
        default=(),
        metavar="OURS=THEIRS",
        help="keys of the records for fields of the schema, such as text=caption_en; default: the usual keys",
    )
    group.add_argument(
        "--image-placeholder",
        default="",
        metavar="TEXT",
        help="text in turns of users that is the place of an image, such as [IMG]; a literal <image> is then text; "
        "default: <image>",
    )
    group.add_argument(
        "--transform",
        default="",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="Python function that turns a record into one of the published form, a list of them, or None to reject "
        "it; "
        "its source file must not change during the run; default: none",
    )
    group.add_argument(
        "--caption-prompts",
        default="",
        metavar="FILE",
        help="text file with one prompt a line; one of them, drawn by --seed, asks for each caption; default: a "
        "caption is a document, the image and then its text",
    )
    group.add_argument(
        "--max-document-tokens",
        type=int,
        default=MAX_DOCUMENT_TOKENS,
        metavar="TOKENS",
        help="a longer document is split into consecutive samples, never within an image; from 2 to the "
        "--seq-length of the packs (%(default)s)",
    )


def given_schema_flags(arguments: argparse.Namespace, shared: bool = False) -> list[str]:
    """The flags of one data set, with ``shared`` also those of all, that were given."""
    defaults: dict[str, Any] = _OF_ONE | (_SHARED if shared else {})
    given = (name for name, default in defaults.items() if getattr(arguments, name) != default)
    return [f"--{name.replace('_', '-')}" for name in given]


def schema_of(arguments: argparse.Namespace) -> SchemaOptions:
    """The options of --input.

    Raises:
        DataError: they cannot be used, or the file of prompts cannot be read.
    """
    return SchemaOptions(
        arguments.schema,
        tuple(arguments.columns),
        arguments.image_placeholder,
        arguments.transform,
        prompts=_prompts(arguments),
        max_document_tokens=arguments.max_document_tokens,
    )


def shared_options(arguments: argparse.Namespace) -> SchemaOptions:
    """The options of all data sets of a registry that have none of their own.

    Raises:
        DataError: as `schema_of`.
    """
    return SchemaOptions(prompts=_prompts(arguments), max_document_tokens=arguments.max_document_tokens)


def chosen(sources: Sequence[Source], to_answer: bool = False) -> list[Source]:
    """The data sets with their schemas, which are printed; ``to_answer`` is that of `choose_schemas`.

    Raises:
        DataError: as `choose_schemas`.
    """
    found = choose_schemas(sources, to_answer)
    for line in dict.fromkeys(map(schema_line, found, sources)):  # once for all files of a data set
        print(line, flush=True)
    return found


def _prompts(arguments: argparse.Namespace) -> tuple[str, ...]:
    return read_prompts(arguments.caption_prompts) if arguments.caption_prompts else ()


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not ours or not equals or not theirs:
        raise argparse.ArgumentTypeError(f"{text} must have the form OURS=THEIRS, such as text=caption_en")
    return ours, theirs
