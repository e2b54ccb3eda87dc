"""Compares ways to initialise the new keys by gradients, clipping and losses of the first 200 steps.

    python examples/key_hw_init/compare.py --output docs      25 minutes on one core; needs the extra quickstart

Trains a Qwen3 of the quickstart's size on texts, makes a NEO of it in each way, and runs the first 200 of 2,000 steps
on the quickstart's images and texts. Writes `key_hw_init.svg`, and prints the table of `docs/key_hw_init.md`.
"""

from neo_megatron import command_line
from neo_megatron.paths import Wanted

if __name__ == "__main__":  # before the imports below, which take seconds
    command_line.begin("compare_key_hw_init", {"--output": Wanted.OUTPUT})

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from curves import Recorded, draw, table
from safetensors.torch import load_file, save_file
from starts import train_qwen3, write_packs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import KeyHwInit, init_from_qwen3
from neo_megatron.data.chat import load_tokenizer

STEPS = 200
SMALL = 1e-5


@dataclass(frozen=True)
class Way:
    """A way to start training.

    Args:
        name: in the plot and the table.
        init: `--key-hw-init` of `qwen3-to-neo`.
        std: standard deviation with which K_hw is drawn after that; ``None`` keeps it.
        clipping: "apart" first clips the gradient of the keys separately.
        stage: `--training-stage`.
        warm_up: steps.
        clip_grad: the norm to which gradients are clipped; 0 for no clipping.
    """

    name: str
    init: KeyHwInit
    std: float | None = None
    clipping: str = "together"
    stage: int = 1
    warm_up: int = 20
    clip_grad: float = 1.0


WAYS = (
    Way("published", "published"),
    Way("zero-norm", "zero-norm"),
    Way("small random keys", "published", std=SMALL),
    Way("keys clipped apart", "published", clipping="apart"),
    Way("published, warm-up of 1,000 steps", "published", warm_up=1000),
    Way("zero-norm, warm-up of 1,000 steps", "zero-norm", warm_up=1000),
    Way("published, warm-up of 1,000 steps, no clipping", "published", warm_up=1000, clip_grad=0),
    Way("zero-norm, warm-up of 1,000 steps, no clipping", "zero-norm", warm_up=1000, clip_grad=0),
    Way("published, stage 2", "published", stage=2),
    Way("zero-norm, stage 2", "zero-norm", stage=2),
)
# Titles of the rows of the plot, and the ways that each shows.
DRAWN = {"stage 1, warm-up of 20 steps": slice(0, 4), "stage 1, warm-up of 1,000 steps": slice(4, 6)}


def make_start(way: Way, qwen3: Path, scratch: Path) -> Path:
    """The NEO to start from, in Hugging Face form; its Megatron form is next to it."""
    directory = scratch / "starts" / f"{way.init}-{way.std}"
    if directory.exists():
        return directory
    tokenizer = load_tokenizer(scratch / "data" / "tokenizer")
    init_from_qwen3(qwen3, directory, 2, patch_embedding_size=64, tokenizer=tokenizer, key_hw_init=way.init)
    if way.std:
        _change(directory / "model.safetensors", lambda keys: keys.normal_(0, way.std))
    convert_hf_to_megatron(directory, directory.with_name(directory.name + "-megatron"))
    return directory


def _change(weights: Path, change: Callable[[torch.Tensor], object]) -> None:
    """Changes the projections of the new keys in the post-LLM, layers 2 and 3."""
    torch.manual_seed(1)
    tensors = load_file(weights)
    for layer in (2, 3):
        change(tensors[f"language_model.model.layers.{layer}.self_attn.k_proj_hw.weight"])
    save_file(tensors, weights, metadata={"format": "pt"})


def run(way: Way, start: Path, packs: dict[str, Path], output: Path) -> Recorded:
    """The first steps of a run, in a process of its own."""
    if not (output / "finished").exists():
        output.mkdir(parents=True)
        flags = [
            *("--neo-model", start, "--pretrained-checkpoint", f"{start}-megatron", "--training-stage", way.stage),
            *("--train-data-path", packs["mixed"], "--valid-data-path", packs["text-test"], "--num-workers", 0),
            *("--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 2000, "--exit-interval", STEPS),
            *("--lr-warmup-iters", way.warm_up, "--eval-interval", 10, "--eval-iters", 16, "--log-interval", 1),
            *("--clip-grad", way.clip_grad, "--tensorboard-dir", output),
        ]
        command = [sys.executable, Path(__file__).with_name("run.py"), output / "norms.jsonl", way.clipping, *flags]
        single = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29531", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        with (output / "log.txt").open("w") as log:
            subprocess.run(
                list(map(str, command)),
                check=True,
                stdout=log,
                stderr=log,
                env={**os.environ, **single, "OMP_NUM_THREADS": "1"},
            )
        (output / "finished").touch()
    print(f"{way.name}: done", flush=True)
    return Recorded.read(way.name, way.clip_grad, output)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the plot")
    parser.add_argument("--scratch", type=Path, help="directory to keep intermediate files in; default: temporary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        packs = write_packs(scratch)
        qwen3 = train_qwen3(scratch, packs)
        recorded = [run(way, make_start(way, qwen3, scratch), packs, scratch / "runs" / way.name) for way in WAYS]
    (arguments.output / "key_hw_init.svg").write_text(draw([(title, recorded[part]) for title, part in DRAWN.items()]))
    print(table(recorded))


if __name__ == "__main__":
    command_line.run("compare_key_hw_init", main)
