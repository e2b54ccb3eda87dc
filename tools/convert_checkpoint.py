"""Converts checkpoints: Qwen3 -> NEO, NEO in Hugging Face form -> Megatron, Megatron -> Hugging Face form."""

import argparse
import sys
from typing import get_args

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import KeyHwInit, init_from_qwen3
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.errors import DataError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    init = commands.add_parser("qwen3-to-neo", help="put a pre-buffer and a patch embedding in front of a Qwen3")
    init.add_argument("--qwen3", required=True, metavar="HF_DIR")
    init.add_argument("--pre-buffer-layers", required=True, type=int, help="12 for NEO-2B, 6 for NEO-9B")
    init.add_argument("--patch-embedding-size", type=int, default=1024)
    init.add_argument("--tokenizer", metavar="HF_DIR", help="gets NEO's tokens and is saved with the model")
    init.add_argument(
        "--vocab-size", type=int, help="rows of the embedding (default: Qwen3's, more if the tokenizer needs)"
    )
    init.add_argument("--seed", type=int, default=0, help="of the pre-buffer and the patch embedding")
    init.add_argument(
        "--key-hw-init",
        choices=get_args(KeyHwInit),
        default="published",
        help="what makes the new keys zero: their projection (published; its gradients are 1,000 times too large at "
        "first) or the weights of their norms; see docs/key_hw_init.md",
    )

    to_megatron = commands.add_parser("hf-to-megatron", help="for --load or --pretrained-checkpoint, on any layout")
    to_megatron.add_argument("--hf", required=True, metavar="NEO_HF_DIR")

    to_hf = commands.add_parser("megatron-to-hf", help="for transformers with trust_remote_code")
    to_hf.add_argument("--megatron", required=True, metavar="DIR", help="what --save filled, or one iteration of it")
    to_hf.add_argument("--tokenizer", required=True, metavar="HF_DIR", help="the one of preprocess_data.py")

    for command in (init, to_megatron, to_hf):
        command.add_argument("--output", required=True, metavar="DIR", help="must not exist yet")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        if args.command == "qwen3-to-neo":
            init_from_qwen3(
                args.qwen3,
                args.output,
                pre_buffer_layers=args.pre_buffer_layers,
                patch_embedding_size=args.patch_embedding_size,
                tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer else None,
                vocab_size=args.vocab_size,
                seed=args.seed,
                key_hw_init=args.key_hw_init,
            )
        elif args.command == "hf-to-megatron":
            convert_hf_to_megatron(args.hf, args.output)
        else:
            convert_megatron_to_hf(args.megatron, args.output, load_tokenizer(args.tokenizer))
    except (ValueError, DataError) as error:
        sys.exit(f"convert_checkpoint: {error}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
