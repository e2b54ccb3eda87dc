"""Measures speed and memory, next to what they are compared to, and prints a table.

neo-megatron benchmark data|train|convert [--only packing loader ...] [--scratch DIR]
neo-megatron benchmark gpu [--only attention steps] [--scratch DIR] [--out FILE.json]
neo-megatron benchmark kernels [--only 9.0 10.0 ...]
neo-megatron benchmark serve [--only batches ...] [--quickstart DIR] [--questions N] [--vllm-python FILE]
"""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

# CPU seconds of one thread: libraries read these when they are imported.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

from neo_megatron.benchmarks.table import markdown

SUITES = {
    "data": ["preprocess", "sources", "memory", "loader", "packing", "storage", "peers"],
    "train": ["train", "stage_one"],
    "convert": ["convert"],
    "gpu": ["attention", "steps"],
    "kernels": ["8.0", "8.9", "9.0", "10.0", "12.0"],  # compute capabilities
    "serve": ["batches", "transformers", "vllm"],
}


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; options that do not fit the suite end with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES, help="what to measure")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="; ".join(f"parts of {suite}: {', '.join(parts)}" for suite, parts in SUITES.items()) + "; default: all",
    )
    parser.add_argument(
        "--scratch", metavar="DIR", help="for inputs and outputs, kept for the next run; default: temporary"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="gpu: file for the figures as JSON; default: none")
    serving = parser.add_argument_group("serve")
    serving.add_argument(
        "--quickstart",
        type=Path,
        metavar="DIR",
        help="output of the quickstart, with the model and the questions; default: examples/quickstart/out",
    )
    serving.add_argument("--questions", type=int, metavar="N", help="test questions to ask; default: 500")
    serving.add_argument(
        "--vllm-python",
        type=Path,
        metavar="FILE",
        help="Python of an environment with vLLM, such as .venv-vllm/bin/python; default: vLLM is not measured",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.only or []) - set(SUITES[arguments.suite]):
        parser.error(f"{arguments.suite} has no part {', '.join(sorted(unknown))}")
    if arguments.out and arguments.suite != "gpu":
        parser.error("--out is for gpu")
    for flag in ("quickstart", "questions", "vllm_python"):
        if getattr(arguments, flag) is not None and arguments.suite != "serve":
            parser.error(f"--{flag.replace('_', '-')} is for serve")
    if arguments.vllm_python is not None and "vllm" not in (arguments.only or SUITES["serve"]):
        parser.error("--vllm-python is for the part vllm, which --only leaves out")
    if arguments.questions is not None and arguments.questions < 1:
        parser.error("--questions must be at least 1")
    return arguments


def main() -> None:
    """Runs a suite, or parts of it, and prints its table."""
    arguments = parse_arguments()
    if arguments.suite == "kernels":
        from neo_megatron.benchmarks import kernels

        print(kernels.measure(arguments.only or SUITES["kernels"]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(arguments.scratch or temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        if arguments.suite == "gpu":
            from neo_megatron.benchmarks import gpu

            print(gpu.measure(scratch, arguments.only or SUITES["gpu"], arguments.out))
            return
        if arguments.suite == "serve":
            from neo_megatron.benchmarks import serve

            quickstart = arguments.quickstart or Path("examples/quickstart/out")
            parts, count = arguments.only or SUITES["serve"], arguments.questions or 500
            print(serve.measure(quickstart, parts, count, arguments.vllm_python, scratch))
            return
        rows, tables = [], []
        for part in arguments.only or SUITES[arguments.suite]:
            print(f"measuring {part}", file=sys.stderr, flush=True)
            measured = importlib.import_module(f"neo_megatron.benchmarks.{part}").measure(scratch)
            if isinstance(measured, str):  # a table of its own
                tables.append(measured)
            else:
                rows += measured
    print("\n\n".join([markdown(rows)] * bool(rows) + tables))
