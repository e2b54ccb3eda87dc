"""Verifies a directory of shards or of packs: every file, every count and every sample; all damage is listed.

neo-megatron verify-data --data shards
neo-megatron verify-data --data packs       # checks that they fit their shards, which are verified separately
"""

import argparse
import os
import sys
import time

from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="directory or address of shards or of packs")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes of one core each, at least 1; only used for shards (%(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


def main() -> None:
    """Verifies, prints all damage, and fails if there is any."""
    arguments = parse_arguments()
    # Manifests may hold paths that are not Unicode.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    started = time.monotonic()
    result = verify(arguments.data, arguments.workers)
    seconds = time.monotonic() - started
    for damage in result.damage:
        print(f"damaged: {damage.file}: {damage.sentence}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"checked {result.summary()} in {seconds:.1f} s")
    if result.damage:
        raise DataError(f"{arguments.data} is damaged in {len(result.damage)} places: {result.remedy()}")
    print(f"{arguments.data} is intact: {result.proven}")
