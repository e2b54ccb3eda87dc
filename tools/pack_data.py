"""Shards -> packs of whole samples for one sequence length; only indices are written, nothing is tokenized again.

python tools/pack_data.py --data shards --output packs --seq-length 16384
"""

import argparse
import sys
from pathlib import Path

from neo_megatron.data.errors import DataError
from neo_megatron.data.files import REJECTS
from neo_megatron.data.pack_index import write_packs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory written by preprocess_data.py")
    parser.add_argument("--output", required=True, help="new directory for the packs")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens of a pack")
    parser.add_argument(
        "--seed", type=int, default=0, help="which samples of equal length meet, and the order of packs"
    )
    parser.add_argument("--on-error", choices=["skip", "fail"], default="skip", help="over-long: listed, or stops")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    manifest = write_packs(arguments.data, arguments.output, arguments.seq_length, arguments.seed, arguments.on_error)
    counts = manifest["counts"]
    print(f"packed {counts['samples_packed']} samples into {counts['packs']} packs, fill {manifest['fill']:.2%}")
    if counts["samples_rejected"]:
        print(f"rejected {counts['samples_rejected']} over-long samples, listed in {Path(arguments.output) / REJECTS}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"pack_data: {error}")
