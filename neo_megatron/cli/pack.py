"""Packs complete samples into sequences of one length; only indices are written, and nothing is tokenized again.

neo-megatron pack --data shards --output packs --seq-length 16384
neo-megatron pack --data web%50 docs text%300 --output packs --seq-length 16384 --held-out 0.5 packs-held-out
"""

import argparse
from fractions import Fraction

from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.manifest_schema import MAX_SEQUENCE_LENGTH
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.prepare.registry import split_path_share, split_share
from neo_megatron.errors import DataError
from neo_megatron.storage.base import join


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="DIR",
        help="directories written by neo-megatron preprocess, each with an optional share above 0 percent: shards%%50 "
        "uses one half of its records, the same in every epoch, shards%%200 each twice (for another half in every "
        "epoch, pack it alone and give its share in the --mixture of a training); a directory of exactly this name has "
        "no share (100)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new directory for the packs, or that of an unfinished run; also s3://bucket/prefix or msc://profile/prefix",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        required=True,
        metavar="TOKENS",
        help=f"tokens of a pack, from 2 to {MAX_SEQUENCE_LENGTH}; longer samples are left out",
    )
    parser.add_argument(
        "--held-out",
        nargs=2,
        metavar=("PERCENT", "DIR"),
        help="packs this share of the records, above 0 and below 100 percent, separately for --valid-data-path, each "
        "record once; records with the same image or video file stay together, so give all data sets of a training run "
        "in one call (no records)",
    )
    parser.add_argument(
        "--held-out-by",
        choices=["path", "content"],
        help="files are the same if their resolved paths are equal, or their bytes; content also finds copies and does "
        "not change when a data set is moved (path)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the draw from data sets with a share; any integer (%(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=["skip", "fail"],
        default="skip",
        help="skip lists an over-long sample in rejects.jsonl and continues; fail stops at the first (%(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.held_out_by and not arguments.held_out:
        parser.error("--held-out-by goes with --held-out")
    return arguments


def main() -> None:
    """Packs and prints a report."""
    arguments = parse_arguments()
    inputs = [PackInput(*split_path_share(text)) for text in arguments.data]
    held_out = None
    if arguments.held_out:
        percent, directory = arguments.held_out
        _, share = split_share(f"--held-out%{percent}")
        if share >= 1:
            raise DataError(f"--held-out {percent} must be above 0 and below 100 percent")
        held_out = HeldOut(share, directory, arguments.held_out_by or HeldOut.by)
    outputs = [arguments.output] + ([held_out.output] if held_out else [])
    manifests = write_packs(
        inputs, arguments.output, arguments.seq_length, arguments.seed, arguments.on_error, held_out
    )
    for output, manifest in zip(outputs, manifests, strict=True):
        report(output, manifest)
    if held_out:
        report_split(manifests[0]["split"], held_out.share)


def report(output: str, manifest: dict) -> None:
    """Prints the contents of a directory of packs."""
    counts, tokens = manifest["counts"], manifest["counts"]["tokens"]
    padding = counts["packs"] * manifest["seq_length"] - tokens
    print(f"{output}: packed {counts['samples_packed']} samples into {counts['packs']} packs")
    print(f"  fill {manifest['fill']:.3%}, {padding} tokens of padding")
    for entry in manifest["data"] if len(manifest["data"]) > 1 else []:
        print(f"  {entry['tokens'] / tokens:.1%} of the tokens are of {entry['shards']} ({entry['samples']} samples)")
    if any(Fraction(entry["share"]).denominator > 1 for entry in manifest["data"]):
        print("  shares: every epoch has the same records; with --mixture a training draws others in every epoch")
    if even := manifest["imbalance"]:
        print(f"  largest over mean work of {even['ranks']} ranks with {even['packs_per_rank']} packs each:")
        for kind, drawn in even["drawn"].items():
            if drawn:  # text alone has no images
                print(f"    {kind} {drawn:.3f} as drawn, {even['balanced'][kind]:.3f} as dealt in training")
    if counts["samples_rejected"]:
        print(f"  rejected {counts['samples_rejected']} over-long samples, listed in {join(output, REJECTS)}")


def report_split(split: dict, share: Fraction) -> None:
    """Prints how many records the held-out split kept together."""
    if split["linked_records"]:
        print(
            f"held out by {split['by']}: {split['linked_records']} of {split['records']} records are linked by records "
            f"of several files, at most {split['largest_group']} in a group; a group stays on one side"
        )
    if split["kept_in_training"]:
        print(
            f"  {split['kept_in_training']} records are in groups that share files and are each larger than the "
            f"{float(share):.2%} to be held out; they are all kept in training"
        )
