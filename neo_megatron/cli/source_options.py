"""Options that select the annotations of a command: the files of one data set, or data sets of a registry."""

import argparse
from collections import Counter

from neo_megatron.cli.schema_options import add_schemas, chosen, given_schema_flags, schema_of, shared_options
from neo_megatron.data.prepare.input_files import annotation_files, name_of_data_set
from neo_megatron.data.prepare.registry import Source, data_list, sources_of_files
from neo_megatron.errors import DataError


def add_sources(parser: argparse.ArgumentParser, with_links: bool = False) -> None:
    """Adds --input, --registry, --datasets and --image-root; ``with_links`` adds --follow-links."""
    group = parser.add_argument_group("annotations")
    inputs = group.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="annotation files, globs or directories, or addresses of these (s3://, msc://), which are one data set: a "
        "JSON array, .jsonl with one record a line, both also .gz or .zst, Parquet, Arrow, or WebDataset tars",
    )
    inputs.add_argument(
        "--registry",
        metavar="FILE",
        help="YAML file, or its address, that maps names to data sets, which may have pixel limits and other options "
        "of their own; needs --datasets",
    )
    group.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help="names in the registry, each with an optional share above 0 percent: name%%50 uses half of the records, "
        "name%%200 each twice (100)",
    )
    group.add_argument(
        "--image-root",
        default="",
        metavar="DIR",
        help="directory or address to which the image and video paths in --input are relative, and which they must not "
        "leave; without it paths are absolute, or relative to the directory of the annotation file",
    )
    if with_links:
        group.add_argument(
            "--follow-links",
            action="store_true",
            help="trust symbolic links in --image-root that lead outside of it; .. and absolute paths still must not",
        )
    add_schemas(parser)


def check_sources(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a usage error if these options contradict each other."""
    if bool(arguments.registry) != bool(arguments.datasets):
        parser.error("--registry and --datasets go together")
    if arguments.registry and arguments.image_root:
        parser.error("--image-root goes with --input; a registry has data_path")
    if arguments.registry and getattr(arguments, "follow_links", False):
        parser.error("--follow-links goes with --input; a registry has follow_links: true")
    if arguments.registry and (given := given_schema_flags(arguments)):
        parser.error(f"{given[0]} goes with --input; a registry has {given[0].removeprefix('--').replace('-', '_')}")


def sources_of(arguments: argparse.Namespace) -> list[Source]:
    """The selected annotation files.

    Raises:
        DataError: a path or a name is wrong, or a file is not what its name says.
    """
    if arguments.registry:
        return data_list(arguments.datasets, arguments.registry, shared_options(arguments))
    return input_sources(arguments)


def input_sources(arguments: argparse.Namespace) -> list[Source]:
    """The files of --input, which are one data set.

    Raises:
        DataError: as `sources_of`.
    """
    links = getattr(arguments, "follow_links", False)
    found = [annotation_files(path, "--input") for path in arguments.input]
    files = [file for some in found for file in some]
    if twice := next((file for file, count in Counter(files).items() if count > 1), None):
        raise DataError(f"--input names {twice} twice; name it once")
    return sources_of_files(
        files,
        name=name_of_data_set(arguments.input[0], found[0]),
        image_root=arguments.image_root,
        follow_links=links,
        schema=schema_of(arguments),
    )


def chosen_sources(arguments: argparse.Namespace) -> list[Source]:
    """As `sources_of`, with the schema of each, which is printed."""
    return chosen(sources_of(arguments))
