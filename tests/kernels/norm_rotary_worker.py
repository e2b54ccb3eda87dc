"""Runs `NormRotary` in Triton's interpreter, on a CPU, against the reference in float64.

Started by `test_norm_rotary.py` with cases as JSON, one line each on standard input. Prints for each case a line of
JSON: for each result its error over the allowed one, and what was written that must not be.
"""

import json
import sys

from support import triton_interpreter

triton_interpreter.install()

import torch
from support.norm_rotary_cases import Case, at_once, excesses, results

from neo_megatron.model.gpu_kernels import norm_rotary

torch.set_num_threads(1)
# New memory holds NaN, so that what a kernel does not write shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

launch = norm_rotary.launch_backward


def checked_launch(layer, d_heads, gradients):
    inputs = [*layer.projections, *layer.weights(), *layer.tables, *d_heads]
    before = [x.clone() for x in inputs]
    launch(layer, d_heads, gradients)
    for x, copy in zip(inputs, before, strict=True):
        assert torch.equal(x, copy), "the backward wrote to its inputs"
    memory.append([gradient is not None for gradient in gradients.projections] + [gradients.partial_sums.shape[-1]])


norm_rotary.launch_backward = checked_launch
for line in sys.stdin:
    case, memory = Case(**json.loads(line)), []
    found = results(norm_rotary.NormRotary.apply, case)
    errors = excesses(found, results(at_once, case, dtype=torch.float64))
    print(json.dumps({"errors": errors, "memory": memory[0], "dtypes": [str(x.dtype) for x in found]}), flush=True)
