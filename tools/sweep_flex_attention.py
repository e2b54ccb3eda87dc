"""Times all block sizes of FlexAttention that fit this GPU, with the heads of NEO and a pack of mixed lengths.

    python tools/sweep_flex_attention.py --neo-model neo-2b --seq-length 8192 [--out FILE.json]

The current choice is printed first, then the fastest; write a faster one into `neo_megatron/model/flex_kernel.py`.
Every choice is compiled, which takes about half an hour.
"""

from neo_megatron import command_line

if __name__ == "__main__":  # before the imports below, which take seconds
    command_line.begin("sweep_flex_attention", {})

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from neo_megatron import presets
from neo_megatron.benchmarks.gpu_attention import AttentionInputs
from neo_megatron.benchmarks.gpu_packs import draw_packs
from neo_megatron.benchmarks.gpu_timing import kernel_seconds
from neo_megatron.benchmarks.gpu_window import SEED
from neo_megatron.model import compiled
from neo_megatron.model.block_mask import SeenKeys, computed_pairs
from neo_megatron.model.core_attention import FLEX_BLOCK, FlexMask, attend
from neo_megatron.model.flex_kernel import Backward, Forward, Widths, all_that_fit, kernel_options
from neo_megatron.model.mask import AttentionRule

SHOWN = 10
Options = dict[str, int]


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neo-model", default="neo-2b", choices=("neo-2b", "neo-9b"), help="preset (%(default)s)")
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens of the pack (%(default)s)")
    parser.add_argument("--out", type=Path, help="file to write all times to, as JSON")
    return parser.parse_args()


def main() -> None:
    """Times all choices and prints the fastest."""
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("sweep_flex_attention: this machine has no GPU: run it on one that has")
    sizes = presets.SIZES[arguments.neo_model]
    properties = torch.cuda.get_device_properties(0)
    widths = Widths(2 * sizes.head_dim, sizes.head_dim)
    forwards, backwards = all_that_fit(widths, properties.shared_memory_per_block_optin)
    chosen = kernel_options(widths, (properties.major, properties.minor), properties.shared_memory_per_block_optin)
    if chosen is None:
        sys.exit(f"sweep_flex_attention: FlexAttention has no block size for {properties.name}: SDPA is used there")
    compiled.GRAPHS = 2 * (len(forwards) + len(backwards) + 2)

    inputs = AttentionInputs.draw(sizes, arguments.seq_length)
    (pack,) = draw_packs(sizes, arguments.seq_length, 1, SEED, 1)
    rule = AttentionRule(*(pack[name].to(inputs.query.device) for name in ("document", "image")))
    seen = SeenKeys.of(rule)
    blocks = seen.blocks(arguments.seq_length, FLEX_BLOCK)
    share = computed_pairs(blocks).item() / seen.pairs.item()
    print(f"{properties.name}, {arguments.seq_length:,} tokens: blocks compute {share:.2f} times the allowed pairs")

    def attention(options: Options) -> torch.Tensor:
        return attend(inputs.query, inputs.key, inputs.value, FlexMask(seen, blocks, options), inputs.scale)

    def forward(options: Options) -> float:
        with torch.no_grad():
            return kernel_seconds(lambda: attention(options))

    def backward(options: Options) -> float:
        # With its forward, since a compiled backward writes over what the forward has kept: it runs once.
        tensors = inputs.query, inputs.key, inputs.value
        return kernel_seconds(lambda: torch.autograd.grad(attention(options), tensors, inputs.gradient)) - alone

    alone = forward(chosen)
    times = {
        "forward": time_all("forward", forward, chosen, forwards),
        "backward": time_all("backward", backward, chosen, backwards),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": properties.name, "computed_share": share} | times, indent=1))
    for direction, rows in times.items():
        fastest = sorted((row for row in rows[1:] if row["seconds"]), key=lambda row: row["seconds"])[:SHOWN]
        print(f"\n{direction}: {sum(row['seconds'] is None for row in rows)} of {len(rows)} did not compile")
        for row in (rows[0], *fastest):
            print(f"{1000 * row['seconds']:8.3f} ms  {_words(row['options'])}")


def time_all(
    direction: str, seconds: Callable[[Options], float], chosen: Options, choices: Sequence[Forward | Backward]
) -> list[dict]:
    """Options and seconds of the current choice, which must run, and of all others; None if one does not compile."""
    prefix = "fwd_" if direction == "forward" else "bwd_"
    rows = [{"options": {k: v for k, v in chosen.items() if k.startswith(prefix)}, "seconds": seconds(chosen)}]
    for choice in tqdm(choices, desc=direction):
        try:
            taken = seconds(chosen | choice.options)
        except Exception as error:  # Triton and Inductor raise many types; the table shows which choices failed
            tqdm.write(f"{_words(choice.options)}: {str(error).splitlines()[0][:150]}")
            taken = None
        rows.append({"options": choice.options, "seconds": taken})
    return rows


def _words(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    command_line.run("sweep_flex_attention", main)
