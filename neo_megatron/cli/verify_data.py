"""Proves a directory of shards or of packs: every file, every count, every sample; all damage is listed.

neo-megatron verify-data --data shards
neo-megatron verify-data --data packs       # that they fit their shards, which are to be proven by themselves
"""

import argparse
import os
import sys
import time

from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory of shards or of packs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


def main() -> None:
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
    print(f"looked at {result.summary()} in {seconds:.1f} s")
    if result.damage:
        raise DataError(f"{arguments.data} is damaged in {len(result.damage)} places: {result.remedy()}")
    print(f"{arguments.data} is intact: {result.proven}")
