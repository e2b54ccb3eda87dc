"""Converts checkpoints: Qwen3 -> NEO, NEO in Hugging Face form -> Megatron, Megatron -> Hugging Face form.

Also extracts pre-buffers, puts them in front of other Qwen3s, and describes checkpoints.
"""

import argparse
import re
import sys
import warnings
from typing import Any, get_args

import torch

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.hf_directory import DTYPE_NAMES
from neo_megatron.checkpoint.hub import model_directory, tokenizer_directory
from neo_megatron.checkpoint.info import contents, weights_hash
from neo_megatron.checkpoint.init_qwen3 import KeyHwInit, init_from_qwen3
from neo_megatron.checkpoint.names import Start
from neo_megatron.checkpoint.pre_buffer import extract_pre_buffer, open_pre_buffer
from neo_megatron.checkpoint.reader import open_either
from neo_megatron.checkpoint.to_hf import SHARD_BYTES, convert_megatron_to_hf
from neo_megatron.command_line import program_name
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.model.attention_forms import FORMS

DTYPES = [str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES]
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_arguments() -> argparse.Namespace:
    """Parses a subcommand and its options; ``run`` is the function of the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (
        *(add_qwen3_to_neo, add_hf_to_megatron, add_megatron_to_hf),
        *(add_extract_pre_buffer, add_attach_pre_buffer, add_info),
    ):
        add(commands)
    return parser.parse_args()


def add_qwen3_to_neo(commands: Any) -> None:
    """Adds the subcommand `qwen3-to-neo`."""
    command = commands.add_parser(
        "qwen3-to-neo", help="put a new pre-buffer and patch embedding in front of a Qwen3: a NEO to start stage 1 from"
    )
    add_hf(command, "--qwen3", metavar="QWEN3_HF_DIR")
    command.add_argument(
        "--pre-buffer-layers",
        required=True,
        type=int,
        metavar="N",
        help="layers of the pre-buffer, 0 or more: 12 for NEO-2B, 6 for NEO-9B",
    )
    command.add_argument(
        "--patch-embedding-size",
        type=int,
        metavar="N",
        default=1024,
        help="channels of the patch embedding, a multiple of 4; default: %(default)s",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="from which new tensors are drawn; default: %(default)s"
    )
    add_new_neo(command)
    add_output(command)
    add_shards(command)
    add_tensors(command)
    command.set_defaults(run=qwen3_to_neo)


def add_new_neo(command: argparse.ArgumentParser) -> None:
    """Adds the options of subcommands that make a NEO from a Qwen3."""
    command.add_argument(
        "--tokenizer",
        metavar="HF_DIR",
        help="gets NEO's tokens and is saved with the model; default: no tokenizer",
    )
    command.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the word embedding; default: those of Qwen3, or of the tokenizer if it has more",
    )
    command.add_argument(
        "--key-hw-init",
        choices=get_args(KeyHwInit),
        default="published",
        help="what makes the new keys of rows and columns zero: their projection (published; its gradients are 1,000 "
        "times too large at first) or the weights of their norms; default: %(default)s; see docs/key_hw_init.md",
    )
    command.add_argument(
        "--attention-form",
        choices=FORMS,
        default="separate",
        help="where the channels for rows and columns come from: projections of their own (NEO 1.0, NEO-ov), or the "
        "channels that Qwen3's heads have (SenseNova-U1); default: %(default)s",
    )


def qwen3_to_neo(args: argparse.Namespace) -> None:
    """Writes a NEO with a new pre-buffer."""
    new_neo(
        args,
        pre_buffer_layers=args.pre_buffer_layers,
        patch_embedding_size=args.patch_embedding_size,
        seed=args.seed,
    )


def new_neo(args: argparse.Namespace, **front: Any) -> None:
    """Writes a NEO from a Qwen3 and the front end given by ``front``."""
    missing = init_from_qwen3(
        model_directory(args.qwen3, args.allow_pickle),
        args.output,
        **front,
        tokenizer=tokenizer_of(args),
        vocab_size=args.vocab_size,
        key_hw_init=args.key_hw_init,
        attention_form=args.attention_form,
        shard_bytes=args.max_shard_size,
        allow_pickle=args.allow_pickle,
        dtype=dtype_of(args),
        allow_missing=args.allow_missing,
    )
    say_missing(missing)


def add_hf_to_megatron(commands: Any) -> None:
    """Adds the subcommand `hf-to-megatron`."""
    command = commands.add_parser(
        "hf-to-megatron", help="write a checkpoint for --load or --pretrained-checkpoint, on any parallel layout"
    )
    add_hf(command, "--hf", metavar="NEO_HF_DIR")
    command.add_argument(
        "--tokenizer",
        metavar="HF_DIR",
        help="the model's tokenizer, which gets NEO's tokens; it tells the ids of <img> and <IMG_CONTEXT> where "
        "NEO_HF_DIR does not; default: the ids there, else those on Qwen3's tokenizer",
    )
    add_output(command)
    add_tensors(command)
    command.set_defaults(run=hf_to_megatron)


def hf_to_megatron(args: argparse.Namespace) -> None:
    """Writes a Megatron checkpoint and lists the tensors that were missing."""
    source = model_directory(args.hf, args.allow_pickle)
    missing = convert_hf_to_megatron(
        source, args.output, args.allow_pickle, dtype_of(args), args.allow_missing, tokenizer_of(args)
    )
    say_missing(missing)


def add_megatron_to_hf(commands: Any) -> None:
    """Adds the subcommand `megatron-to-hf`."""
    command = commands.add_parser("megatron-to-hf", help="write a directory for transformers with trust_remote_code")
    command.add_argument(
        "--megatron", required=True, metavar="DIR", help="a directory that --save filled, or one iteration of it"
    )
    command.add_argument(
        "--tokenizer", required=True, metavar="HF_DIR", help="the tokenizer given to neo-megatron preprocess"
    )
    command.add_argument(
        "--generation-branch",
        metavar="U1_HF_DIR",
        help="the NEO-unify (SenseNova-U1) that was trained: its generation tensors are added as they are, and the "
        "result runs with the code published for it; default: the understanding branch alone, with our code",
    )
    add_output(command)
    add_shards(command)
    add_tensors(command)
    command.set_defaults(run=megatron_to_hf)


def megatron_to_hf(args: argparse.Namespace) -> None:
    """Writes an exported directory and lists the tensors that were missing."""
    branch = model_directory(args.generation_branch) if args.generation_branch else None
    missing = convert_megatron_to_hf(
        args.megatron, args.output, tokenizer_of(args), args.max_shard_size, dtype_of(args), args.allow_missing, branch
    )
    say_missing(missing)


def add_extract_pre_buffer(commands: Any) -> None:
    """Adds the subcommand `extract-pre-buffer`."""
    command = commands.add_parser("extract-pre-buffer", help="take the visual front end out of a NEO")
    add_hf(command, "--neo", metavar="DIR", help="a NEO in either form, or a hub id: org/name@revision")
    add_output(command)
    add_shards(command)
    command.set_defaults(run=extract)


def extract(args: argparse.Namespace) -> None:
    """Writes the pre-buffer of a NEO."""
    neo = open_either(model_directory(args.neo, args.allow_pickle), args.allow_pickle)
    for sentence in neo.said:
        warnings.warn(f"{args.neo}/config.json: {sentence}", stacklevel=1)
    extract_pre_buffer(neo, args.output, args.max_shard_size)


def add_attach_pre_buffer(commands: Any) -> None:
    """Adds the subcommand `attach-pre-buffer`."""
    command = commands.add_parser(
        "attach-pre-buffer", help="put a trained pre-buffer in front of a Qwen3 of the same shape"
    )
    command.add_argument("--pre-buffer", required=True, metavar="DIR", help="a directory that extract-pre-buffer wrote")
    add_hf(command, "--qwen3", metavar="QWEN3_HF_DIR")
    add_new_neo(command)
    add_output(command)
    add_shards(command)
    add_tensors(command)
    command.set_defaults(run=attach)


def attach(args: argparse.Namespace) -> None:
    """Writes a NEO with a trained pre-buffer."""
    new_neo(args, pre_buffer=open_pre_buffer(model_directory(args.pre_buffer)))


def add_info(commands: Any) -> None:
    """Adds the subcommand `info`."""
    command = commands.add_parser("info", help="describe a checkpoint, with a hash that is the same in either form")
    command.add_argument("checkpoint", metavar="DIR", help="a NEO in either form, a Qwen3, or a hub id")
    command.add_argument(
        "--allow-pickle", action="store_true", help="also read pickled weights; nothing but tensors is loaded from them"
    )
    command.set_defaults(run=info)


def info(args: argparse.Namespace) -> None:
    """Prints what a checkpoint contains, and the hash of its weights."""
    opened = contents(model_directory(args.checkpoint, args.allow_pickle), args.allow_pickle)
    for label, text in opened.lines.items():
        print(f"{label:<26}{text}")
    print(f"{'sha256 of the weights':<26}{weights_hash(opened)}")


def add_hf(
    command: argparse.ArgumentParser, flag: str, metavar: str, help: str = "a directory, or a hub id: org/name@revision"
) -> None:
    """Adds the option of an input in Hugging Face form, with `--allow-pickle`."""
    command.add_argument(flag, required=True, metavar=metavar, help=help)
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights if there are no safetensors; nothing but tensors is loaded from them",
    )


def tokenizer_of(args: argparse.Namespace) -> Any:
    """The tokenizer of `--tokenizer`; None without one."""
    return load_tokenizer(tokenizer_directory(args.tokenizer)) if args.tokenizer else None


def add_output(command: argparse.ArgumentParser) -> None:
    """Adds `--output`."""
    command.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write; must be empty or not exist yet"
    )


def add_shards(command: argparse.ArgumentParser) -> None:
    """Adds `--max-shard-size`."""
    command.add_argument(
        "--max-shard-size",
        type=byte_size,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="largest weight file, such as 500MB; units B, KB, MB, GB, TB of 1,000; default: 5GB",
    )


def add_tensors(command: argparse.ArgumentParser) -> None:
    """Adds `--dtype` and `--allow-missing`."""
    command.add_argument("--dtype", choices=DTYPES, help="dtype of all tensors written; default: each keeps its own")
    command.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of tensors that may be missing, such as '*_hw.weight'; each starts as in a new NEO and is listed; "
        "may be given several times; default: none",
    )


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype of `--dtype`; None to keep those of the tensors."""
    return getattr(torch, args.dtype) if args.dtype else None


def say_missing(starts: dict[str, Start]) -> None:
    """Prints each missing tensor and its initialization."""
    for name, start in starts.items():
        print(f"missing: {name}, {start}")


def byte_size(text: str) -> int:
    """A size as Hugging Face spells it: decimal units, so 5GB is 5,000,000,000 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip(), re.IGNORECASE)
    if not match or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it as 5GB or 500MB")
    return size


def main() -> None:
    """Runs a subcommand."""
    args = parse_arguments()
    warnings.showwarning = lambda message, *_: print(f"{program_name()}: {message}", file=sys.stderr)
    args.run(args)
    if "output" in args:
        print(f"written to {args.output}")
