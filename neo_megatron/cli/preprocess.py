"""Preprocesses annotations and images into shards, once for all pack lengths. The format: docs/shard_format.md.

neo-megatron preprocess --input train.json --image-root images --tokenizer HF_DIR --output shards
neo-megatron preprocess --registry registry.yaml --datasets llava%50 docvqa --tokenizer HF_DIR --output shards

The same command continues an interrupted run; the data set has the same bytes as without the interruption.
docs/data.md lists the supported forms of annotations, and how each key of a record is treated.

Exit codes: 0 the data set is complete; 1 an error; 2 wrong arguments; 3 more samples were rejected than --max-rejected
allows: shards and the list of rejected samples are written, but no manifest, so the data set cannot be packed.

With --engine ray, tasks run on the cluster of RAY_ADDRESS, else on the cluster that this machine belongs to, else on
this machine. Annotations, images and output must be in object storage, with credentials on all its machines, or on a
file system that they see under the same paths, and neo-megatron must be installed on them.
"""

import argparse
import os
import sys
from typing import Any, get_args

from neo_megatron.checkpoint.hub import tokenizer_directory
from neo_megatron.cli.chat_options import add_chat, chat_settings, check_chat
from neo_megatron.cli.source_options import add_sources, check_sources, chosen_sources
from neo_megatron.cli.video_options import add_video, video_settings
from neo_megatron.command_line import program_name
from neo_megatron.data.config import ImageStore, PreprocessConfig
from neo_megatron.data.manifest import REJECTS
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.tallies import Noticed
from neo_megatron.errors import TooManyRejected
from neo_megatron.storage.base import join

TOO_MANY_REJECTED = 3  # exit code


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser, with_links=True)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="HF_DIR",
        help="directory or hub id of a tokenizer in Hugging Face form; NEO's tokens are added to it",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new directory for the shards, or that of an unfinished run; also s3://bucket/prefix or msc://profile/prefix",
    )
    images = parser.add_argument_group("images and videos")
    images.add_argument(
        "--min-pixels",
        type=int,
        default=PreprocessConfig.min_pixels,
        metavar="PIXELS",
        help="smaller images are enlarged to this area; above 0 (%(default)s)",
    )
    images.add_argument(
        "--max-pixels",
        type=int,
        default=PreprocessConfig.max_pixels,
        metavar="PIXELS",
        help="larger images are reduced to this area; several images of a sample share twice of it, in layout u1 "
        "--sample-tokens; at least --min-pixels (%(default)s)",
    )
    images.add_argument(
        "--image-store",
        choices=get_args(ImageStore),
        default=PreprocessConfig.image_store,
        help="encoded keeps the bytes of image files; reference keeps where they lie, in tars or loose files, which "
        "must stay there; patches keeps pixels, which take several times the space but are not decoded in training "
        "(%(default)s)",
    )
    images.add_argument(
        "--check",
        choices=["decode", "header"],
        default=PreprocessConfig.check,
        help="decode every image to its end, or trust its header; with --image-store patches images are always decoded "
        "(%(default)s)",
    )
    images.add_argument(
        "--video-fps",
        type=float,
        default=PreprocessConfig.video_fps,
        metavar="FPS",
        help="frames taken per second of a video; above 0 (%(default)s)",
    )
    images.add_argument(
        "--max-frames",
        type=int,
        default=PreprocessConfig.max_frames,
        metavar="FRAMES",
        help="frames taken of one video, evenly spaced in longer ones; at least 1 (%(default)s)",
    )
    add_video(images)
    samples = parser.add_argument_group("samples")
    add_chat(samples)
    samples.add_argument(
        "--on-error",
        choices=["skip", "fail"],
        default="skip",
        help="skip lists a rejected sample in rejects.jsonl and continues; fail stops at the first (%(default)s)",
    )
    samples.add_argument(
        "--max-rejected",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="share of rejected samples, from 0 to 100 percent of those read; above it the exit code is 3 and the data "
        "set is not completed, until the same command is run with a higher limit (%(default)s)",
    )
    samples.add_argument(
        "--empty-answers",
        choices=["reject", "keep"],
        default=PreprocessConfig.empty_answers,
        help="whether a sample with a blank answer to train on is rejected, or kept and counted (%(default)s)",
    )
    samples.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the draw from data sets with a share; any integer (%(default)s)",
    )
    samples.add_argument(
        "--records-per-shard",
        type=int,
        default=PreprocessConfig.records_per_shard,
        metavar="RECORDS",
        help="records of an annotation file that make one shard and one task; at least 1; 65536 from 50 million "
        "records on; not below the records of a tar (%(default)s)",
    )
    workers = parser.add_argument_group("workers")
    workers.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="run tasks in processes on this machine, or on a Ray cluster (%(default)s)",
    )
    workers.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes, or tasks in flight on Ray, of one core each; at least 1 (%(default)s)",
    )
    arguments = parser.parse_args()
    check_sources(parser, arguments)
    check_chat(parser, arguments)
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    if not 0 <= arguments.max_rejected <= 100:
        parser.error(f"--max-rejected must be from 0 to 100 percent, not {arguments.max_rejected}")
    return arguments


def main() -> None:
    """Preprocesses and prints a report; exits with 3 if too many samples were rejected."""
    arguments = parse_arguments()
    # One process is one worker; threads of a tokenizer would take the cores of the others.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sources = chosen_sources(arguments)
    settings = PreprocessConfig(
        min_pixels=arguments.min_pixels,
        max_pixels=arguments.max_pixels,
        image_store=arguments.image_store,
        check=arguments.check,
        seed=arguments.seed,
        records_per_shard=arguments.records_per_shard,
        video_fps=arguments.video_fps,
        max_frames=arguments.max_frames,
        **video_settings(arguments),
        **chat_settings(arguments),
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
        report(error.counts, join(arguments.output, REJECTS))
        print(f"{program_name()}: {error}", file=sys.stderr)
        sys.exit(TOO_MANY_REJECTED)
    report(manifest["counts"], join(arguments.output, REJECTS))


def report(counts: dict[str, Any], rejects: str) -> None:
    """Prints what was kept, what was rejected by kind, and what was ignored in the samples kept."""
    kept, with_images = counts["samples_kept"], counts["samples_with_images"]
    print(f"read {counts['samples_read']} samples of {counts['records_read']} records")
    print(f"kept {kept} samples: {with_images} with images, {kept - with_images} without")
    if counts["empty_answers"]:
        print(f"kept {counts['empty_answers']} samples with an empty answer")
    noticed = Noticed(
        ignored_keys=counts["ignored_keys"],
        placeholders=counts["foreign_placeholders"],
        surplus_tags=counts.get("surplus_tags", 0),
    )
    for sentence in noticed.sentences():
        print(sentence)
    print(f"rejected {counts['samples_rejected']} samples")
    for reason, count in counts["rejected_by_reason"].items():
        print(f"rejected {count}: {reason}")
    if counts["samples_rejected"]:
        print(f"each rejected sample is listed in {rejects}", flush=True)
