"""Runs kernels that Inductor generated for a GPU in Triton's interpreter, on a CPU, against the definition in float64.

Started by `test_attention.py`: a directory with forward.py, backward.py and case.json. Prints relative errors.
"""

import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

from support import triton_interpreter  # first: sets a variable that Triton reads on import

triton_interpreter.install()

import torch
import torch._inductor.runtime.triton_helpers as triton_helpers
import torch._inductor.runtime.triton_heuristics as triton_heuristics
import triton
from support.random_packs import random_pack

from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.flex_kernel import FLEX_BLOCK
from neo_megatron.model.mask import AttentionRule

XBLOCK = 64


class Interpreted:
    """A kernel in the place of Inductor's launcher."""

    def __init__(self, function, is_template):
        self.function, self.is_template = function, is_template

    def run(self, *given, stream):
        if self.is_template:  # the grid comes last
            self.function[given[-3:]](*given[:-3])
            return
        sizes = dict(zip(self.function.arg_names, given, strict=False))
        blocks = {"XBLOCK": XBLOCK, "R0_BLOCK": triton.next_power_of_2(sizes.get("r0_numel", 1))}
        used = {name: size for name, size in blocks.items() if name in self.function.arg_names}
        self.function[(triton.cdiv(sizes["xnumel"], XBLOCK),)](*given, **used)


class AsyncCompile:
    """Makes kernels of their source: a file each, from which Triton reads it."""

    def __init__(self, path: Path):
        self.path = path

    def triton(self, name, source, **_):
        file = self.path.with_name(f"{self.path.stem}_{name}.py")
        file.write_text(source)
        namespace = {"__name__": name, "__file__": str(file)}
        exec(compile(source, str(file), "exec"), namespace)
        return namespace[name]

    def wait(self, namespace):
        pass


def call(path: Path, *given):
    """The generated module's `call`, with its kernels interpreted and its memory on the CPU."""
    source = path.read_text()
    source = source[: source.index('if __name__ == "__main__"')]
    for pattern, text in {
        r"^from torch\._inductor\.async_compile import .*$": "",
        r"^async_compile = .*$": "",
        r"^AsyncCompile = .*$": "",
        r"^empty_strided_cuda = .*$": "def empty_strided_cuda(size, stride, dtype):\n"
        "    return torch.empty_strided(size, stride, dtype=dtype).fill_(float('nan'))",
        r"torch\.cuda\._DeviceGuard\(0\)": "nullcontext()",
        r"torch\.cuda\.set_device\(0\)": "pass",
        r"get_raw_stream\(0\)": "0",
    }.items():
        source = re.sub(pattern, text, source, flags=re.M)
    namespace = {"async_compile": AsyncCompile(path), "nullcontext": nullcontext, "torch": torch}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace["call"](list(given))


def long_pack(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A document over several blocks with an image of its own, then many short ones with images, and padding."""
    tail = length // 3
    document, image = random_pack(tail, seed)
    head = length - tail
    first_image = torch.full((head,), -1, dtype=torch.int32)
    first_image[head // 8 : 3 * head // 4] = 1000  # over the border of blocks of 128
    inside = document >= 0
    documents = torch.cat((torch.zeros(head, dtype=torch.int32), torch.where(inside, document + 1, -1)))
    return documents.int(), torch.cat((first_image, image))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def main(directory: Path) -> None:
    case = json.loads((directory / "case.json").read_text())
    triton_helpers.set_driver_to_gpu = lambda: None
    for name in ("template", "persistent_reduction", "reduction", "pointwise"):
        setattr(
            triton_heuristics,
            name,
            lambda *_, template=name == "template", **__: lambda function: Interpreted(function, template),
        )
    torch.manual_seed(0)
    packs = [long_pack(case["keys"], seed) for seed in range(case["packs"])]
    document, image = (torch.stack(parts) for parts in zip(*packs, strict=True))
    rows = torch.arange(case["keys"] - case["queries"], case["keys"])
    rule = AttentionRule(document, image, rows)
    seen = SeenKeys.of(rule)
    blocks = seen.blocks(case["keys"], FLEX_BLOCK)
    dtype = getattr(torch, case["dtype"])
    query, key, value = (
        torch.randn(length, case["packs"], heads, width).to(dtype).permute(1, 2, 0, 3)
        for length, heads, width in (
            (case["queries"], case["heads"], case["query_key"]),
            (case["keys"], case["groups"], case["query_key"]),
            (case["keys"], case["groups"], case["value"]),
        )
    )
    inputs = [query, key, value, blocks.kv_indices, blocks.kv_num_blocks, seen.first, seen.end]
    inputs += [blocks.full_kv_num_blocks, blocks.full_kv_indices, blocks.q_num_blocks, blocks.q_indices]
    inputs += [blocks.full_q_num_blocks, blocks.full_q_indices]

    output, *_, sums = call(directory / "forward.py", *inputs)
    gradient = torch.randn(output.shape).to(dtype)
    gradients = call(directory / "backward.py", *inputs, output, sums, gradient)

    exact = [x.double().detach().requires_grad_() for x in (query, key, value)]
    k, v = (x.repeat_interleave(case["heads"] // case["groups"], dim=1) for x in exact[1:])
    score = exact[0] @ k.mT / math.sqrt(case["value"])
    weight = score.masked_fill(~rule.dense()[:, None], -math.inf).softmax(dim=-1)
    expected = weight @ v
    expected.backward(gradient.double())
    errors = {"out": relative_error(output, expected)}
    for name, actual, tensor in zip(("dQ", "dK", "dV"), gradients, exact, strict=False):
        errors[name] = relative_error(actual, tensor.grad)
    full = int(blocks.full_kv_num_blocks.sum())
    print(json.dumps({"errors": errors, "full blocks": full, "partial blocks": int(blocks.kv_num_blocks.sum())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
