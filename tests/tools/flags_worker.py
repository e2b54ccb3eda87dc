"""Parses and checks the command line of every run of NEO that `benchmark.py gpu` starts on one H100."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

from benchmarks import gpu, gpu_steps, gpu_train
from benchmarks.gpu_window import Windows

from neo_megatron import pretrain_neo

scale, directory = gpu.ON_GPU, Path(sys.argv[1])
(directory / "config.json").write_text(json.dumps(scale.sizes.to_hf()))
pretrain_neo.set_global_variables = lambda args: None  # of which a process has one set
parsed = 0
for run in gpu_steps.runs(scale):
    if run.who == gpu_steps.OURS:
        run = replace(run, recomputed=gpu_steps.planned(run, scale.sizes, memory=80e9))
        windows = Windows(scale.sizes, run.training_stage, (run.length,), scale.steps)
        sys.argv = ["pretrain_neo", *gpu_train.arguments(windows, directory), *gpu_steps.flags(run)]
        args = pretrain_neo.parse_arguments()
        assert (args.fp8_recipe if args.fp8 else "bf16") == run.precision
        assert args.recompute_num_layers in (None, run.recomputed)
        parsed += 1
print(parsed, "command lines")
