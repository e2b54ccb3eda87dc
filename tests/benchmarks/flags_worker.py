"""Parses and checks, as on one H100, every command line of NEO that `benchmark.py gpu` and `tests/gpu` start there."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install_training()

from gpu import test_fp8_load, test_training
from megatron.training import arguments

from neo_megatron.benchmarks import gpu_steps, gpu_train
from neo_megatron.benchmarks.gpu_window import Windows
from neo_megatron.run import start_checks, training_arguments


def parsed(flags: list[str]):
    sys.argv = ["pretrain_neo", *flags]
    return training_arguments.parse_arguments()


start_checks._check_packages = lambda args: {"transformer_engine"}  # a machine with GPUs has it
training_arguments.set_global_variables = lambda args: None  # of which a process has one set
training_arguments.take_lengths = lambda args: setattr(args, "pack_lengths", [])  # there are no packs
cpu_platform.argument_defaults = dict  # a GPU needs none
arguments.get_device_arch_version = lambda: 9

scale, directory, count = gpu_steps.ON_GPU, Path(sys.argv[1]), 0
(directory / "config.json").write_text(json.dumps(scale.sizes.to_hf()))
for run in gpu_steps.runs(scale):
    if run.who == gpu_steps.OURS:
        run = replace(run, recomputed=gpu_steps.planned(run, scale.sizes, memory=80e9))
        windows = Windows(scale.sizes, run.training_stage, (run.length,), scale.steps)
        args = parsed([*gpu_train.arguments(windows, directory), *gpu_steps.flags(run)])
        assert (args.fp8_recipe if args.fp8 else "bf16") == run.precision.removesuffix("-bf16-ends")
        assert args.first_last_layers_bf16 == run.precision.endswith("-bf16-ends")
        assert args.recompute_num_layers in (None, run.recomputed)
        count += 1
still = [[*flags, *test_fp8_load.STILL] for flags in ([], test_training.fp8("tensorwise"))]
for flags in ([], *map(test_training.fp8, ("delayed", "tensorwise", "blockwise")), *still):
    args = parsed([*test_training.command(directory, *flags), "--seq-length", "256"])
    # Defaults of a machine with a GPU.
    assert args.transformer_impl == "transformer_engine" and args.distributed_backend == "nccl"
    assert args.gradient_accumulation_fusion and args.params_dtype.itemsize == 2
    count += 1
print(count, "command lines")
