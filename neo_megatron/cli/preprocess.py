"""Annotations and images -> indexed shards, once for every pack length. The format: docs/shard_format.md.

neo-megatron preprocess --input train.json --image-root images --tokenizer HF_DIR --output shards
neo-megatron preprocess --registry registry.yaml --datasets llava%50 docvqa --tokenizer HF_DIR --output shards

The same command continues a run that was interrupted; the data set is the same to the byte.
docs/data.md says which forms of annotations are read, and what becomes of each key of a record.

Exit codes: 0 the data set is complete; 1 an error; 2 wrong arguments; 3 more samples were rejected than --max-rejected
allows: there are shards and the list of rejects, but no manifest, so that nothing packs them.

With --engine ray the tasks run on the cluster of RAY_ADDRESS, else on the one that this machine belongs to, else on
this machine. Annotations, images and output must lie on a file system that all its machines see under the same
paths, and neo-megatron must be installed on them.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from neo_megatron.checkpoint.hub import tokenizer_directory
from neo_megatron.command_line import program_name
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.data.prepare.tallies import Noticed
from neo_megatron.errors import TooManyRejected

TOO_MANY_REJECTED = 3  # exit code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", help="annotation file: a JSON array, or .jsonl with one record a line")
    inputs.add_argument("--registry", help="YAML file that maps names to data sets")
    parser.add_argument("--datasets", nargs="+", help="names in the registry, each with an optional share: name%%50")
    parser.add_argument("--image-root", default="", help="directory of the images of --input, which none may leave")
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="trust symbolic links in --image-root that lead outside it; .. and absolute paths still may not",
    )
    parser.add_argument("--tokenizer", required=True, help="Hugging Face directory or hub id; NEO's tokens are added")
    parser.add_argument("--output", required=True, help="new directory for the shards")
    parser.add_argument("--min-pixels", type=int, default=PreprocessConfig.min_pixels, help="per image (%(default)s)")
    parser.add_argument("--max-pixels", type=int, default=PreprocessConfig.max_pixels, help="per image (%(default)s)")
    parser.add_argument(
        "--image-store",
        choices=["encoded", "patches"],
        default=PreprocessConfig.image_store,
        help="keep the bytes of the files, or pixels that need no decoding in training and several times the space",
    )
    parser.add_argument(
        "--check",
        choices=["decode", "header"],
        default=PreprocessConfig.check,
        help="decode every image to its end, or trust its header; patches are always decoded (%(default)s)",
    )
    parser.add_argument(
        "--video-fps", type=float, default=PreprocessConfig.video_fps, help="frames a second (%(default)s)"
    )
    parser.add_argument(
        "--max-frames", type=int, default=PreprocessConfig.max_frames, help="of one video (%(default)s)"
    )
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="processes here, or a Ray cluster")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes, or tasks in flight on Ray, of one CPU each (%(default)s)",
    )
    parser.add_argument("--on-error", choices=["skip", "fail"], default="skip", help="a bad sample is listed, or stops")
    parser.add_argument(
        "--max-rejected",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="of the samples read, from 0 to 100; above it the exit code is 3 and the data set is not completed, until "
        "the same command is run with a higher limit (%(default)s)",
    )
    parser.add_argument(
        "--empty-answers",
        choices=["reject", "keep"],
        default=PreprocessConfig.empty_answers,
        help="a sample with an empty or blank answer to train on is rejected, or kept and counted (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the draw from data sets with a share (0)")
    parser.add_argument(
        "--records-per-shard", type=int, default=PreprocessConfig.records_per_shard, help="(%(default)s)"
    )
    arguments = parser.parse_args()
    if bool(arguments.registry) != bool(arguments.datasets):
        parser.error("--registry and --datasets go together")
    if arguments.registry and arguments.image_root:
        parser.error("--image-root goes with --input; a registry has data_path")
    if arguments.registry and arguments.follow_links:
        parser.error("--follow-links goes with --input; a registry has follow_links: true")
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    if not 0 <= arguments.max_rejected <= 100:
        parser.error(f"--max-rejected must be from 0 to 100 percent, not {arguments.max_rejected}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # One process is one worker; a tokenizer with threads of its own would take the cores of the others.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.registry:
        sources = data_list(arguments.datasets, arguments.registry)
    else:
        name = Path(arguments.input).stem
        sources = [Source(name, arguments.input, arguments.image_root, follow_links=arguments.follow_links)]
    settings = PreprocessConfig(
        min_pixels=arguments.min_pixels,
        max_pixels=arguments.max_pixels,
        image_store=arguments.image_store,
        check=arguments.check,
        seed=arguments.seed,
        records_per_shard=arguments.records_per_shard,
        video_fps=arguments.video_fps,
        max_frames=arguments.max_frames,
        empty_answers=arguments.empty_answers,
    )
    print(f"reading the tokenizer of {arguments.tokenizer}", flush=True)  # importing transformers takes seconds
    try:
        manifest = preprocess(
            sources,
            tokenizer_directory(arguments.tokenizer),
            arguments.output,
            settings,
            arguments.on_error,
            arguments.workers,
            arguments.engine,
            arguments.max_rejected,
        )
    except TooManyRejected as error:
        report(error.counts, Path(arguments.output) / REJECTS)
        print(f"{program_name()}: {error}", file=sys.stderr)
        sys.exit(TOO_MANY_REJECTED)
    report(manifest["counts"], Path(arguments.output) / REJECTS)


def report(counts: dict[str, Any], rejects: Path) -> None:
    """Prints what was kept, what was rejected by kind, and what was ignored in the samples kept."""
    kept, with_images = counts["samples_kept"], counts["samples_with_images"]
    print(f"read {counts['samples_read']} samples of {counts['records_read']} records")
    print(f"kept {kept} samples: {with_images} with images, {kept - with_images} without")
    if counts["empty_answers"]:
        print(f"kept {counts['empty_answers']} samples with an empty answer")
    noticed = Noticed(ignored_keys=counts["ignored_keys"], placeholders=counts["foreign_placeholders"])
    for sentence in noticed.sentences():
        print(sentence)
    print(f"rejected {counts['samples_rejected']} samples")
    for reason, count in counts["rejected_by_reason"].items():
        print(f"rejected {count}: {reason}")
    if counts["samples_rejected"]:
        print(f"each rejected sample is listed in {rejects}", flush=True)
