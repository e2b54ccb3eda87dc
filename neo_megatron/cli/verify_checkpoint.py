"""Verifies a conversion: runs one pack with images through both forms of a NEO and compares layer by layer.

Exit code 0: they agree. 1: they do not, or one of them is broken. Computes in float32 whatever the stored dtypes, with
the weights of one layer, or of the embedding or the head, in memory at a time.
"""

import argparse
import sys
import warnings

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()
# Both warn of loading on one process, and of the order of torch's arguments.
warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed\.checkpoint")

import torch
from megatron.core import parallel_state, tensor_parallel

from neo_megatron.checkpoint.hub import model_directory
from neo_megatron.checkpoint.integrity import stored_pieces, verify_pieces
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.checkpoint.reader import open_megatron
from neo_megatron.parity.comparison import TOLERANCE, compare, describe
from neo_megatron.parity.models import check_same_sizes, run_megatron, run_transformers
from neo_megatron.parity.pack import made_pack


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf", metavar="NEO_HF_DIR", help="a NEO in Hugging Face form, or its hub id: org/name@revision")
    parser.add_argument(
        "megatron", metavar="MEGATRON_DIR", help="a directory that --save filled, or one iteration of it"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pickled weights if there are no safetensors")
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of the tokens and pixels of the pack; default: %(default)s"
    )
    return parser.parse_args()


def main() -> None:
    """Exits with 0 if both forms agree, else with 1."""
    sys.exit(0 if verify(parse_arguments()) else 1)


def verify(args: argparse.Namespace) -> bool:
    """Compares both forms on one pack and prints the result; returns whether they agree."""
    directory = model_directory(args.hf, args.allow_pickle)
    megatron = open_megatron(args.megatron)
    neo = open_neo(directory, args.allow_pickle, token_ids=megatron.sizes.image_token_ids)
    check_same_sizes(neo, megatron)
    sizes, saved = megatron.sizes, megatron.source.directory
    verify_pieces(stored_pieces(saved))
    for sentence in neo.said:
        print(f"{args.hf}/config.json: {sentence}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pack = made_pack(sizes, args.seed)
    seen = run_transformers(neo, pack, device)
    _one_process()
    differences = compare(seen, run_megatron(sizes, saved, pack, device))
    print(describe(differences, sizes.pre_buffer_layers))
    worst = next((it for it in differences if not it.agrees), None)
    if worst:
        print(f"they differ: {worst.part} is the first part with a token outside the tolerance of {TOLERANCE:g}")
    else:
        print(f"they agree: every token of every part within {TOLERANCE:g} of its length")
    return worst is None


def _one_process() -> None:
    """Sets up the process groups that Megatron's model expects."""
    store = torch.distributed.HashStore()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
