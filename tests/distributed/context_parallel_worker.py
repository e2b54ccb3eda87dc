"""Both ways of context parallelism on 2 and 4 gloo ranks: outputs, gradients, bytes kept and sent.

    torchrun --nproc-per-node 4 context_parallel_worker.py DIRECTORY

Every rank reads the same packs from `inputs.safetensors`, attends for its own rows only and writes what it got to
`rank<N>.safetensors`.
"""

import gc
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()

from megatron.core import tensor_parallel

from neo_megatron.model.context_parallel import context_parallel_attention
from neo_megatron.model.core_attention import attend, build_mask
from neo_megatron.model.cp_token_split import contiguous_rows, even_rows
from neo_megatron.model.mask import AttentionRule

NAMES = ("query", "key", "value")


def attention(inputs: dict[str, torch.Tensor], way: str, group, recompute: bool) -> dict[str, torch.Tensor]:
    """This rank's output and the gradients of its queries, keys and values."""
    ranks, rank = group.size(), group.rank()
    document, image = inputs["document"], inputs["image"]
    all_rows = even_rows(document, image, ranks) if way == "allgather" else contiguous_rows(document.shape[1], ranks)
    gathered = way == "allgather"
    rule = AttentionRule(document, image, all_rows[rank] if gathered else None)
    core = partial(attend, mask=build_mask(rule, torch.float64), scale=0.25)
    if recompute:
        core = partial(tensor_parallel.checkpoint, core, False)
    mine = [inputs[name][all_rows[rank]].requires_grad_() for name in NAMES]
    order = all_rows.flatten().argsort() if gathered else None
    output = context_parallel_attention(core, *mine, group, order)
    output.backward(inputs["gradient"][all_rows[rank]])
    gradients = {name: x.grad for name, x in zip(NAMES, mine, strict=True)}
    return {"rows": all_rows[rank], "output": output.detach(), **gradients}


class KernelThatKeepsItsInputs(torch.autograd.Function):
    """Stand-in for a fused kernel, without its arithmetic: queries, keys, values and output."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = value.new_zeros(*query.shape[:2], query.shape[2] * value.shape[3])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, _gradient):
        query, key, value, _ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


class Held(TorchDispatchMode):
    """Follows the bytes of all tensors that were made under it and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def now(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())

    def in_the_end(self) -> int:
        """Once nothing more is let go of: gloo's threads hold on to what was sent until they are scheduled again."""
        looks = [self.now()]
        while len(looks) < 6 or len(set(looks[-6:])) > 1:
            time.sleep(0.1)
            looks.append(self.now())
        return looks[-1]


class Sent:
    """Counts the bytes that this rank sends to others; a part of a collective that stays here is none."""

    def __init__(self) -> None:
        self.bytes = 0
        self._count("all_to_all_single", lambda output, sent, ranks: sent.nbytes * (ranks - 1) // ranks)
        self._count("all_gather_into_tensor", lambda output, sent, ranks: sent.nbytes * (ranks - 1))
        self._count("reduce_scatter_tensor", lambda output, sent, ranks: output.nbytes * (ranks - 1))

    def _count(self, name: str, size) -> None:
        collective = getattr(torch.distributed, name)

        def counted(output, sent, *args, group, **kwargs):
            self.bytes += size(output, sent, group.size())
            return collective(output, sent, *args, group=group, **kwargs)

        setattr(torch.distributed, name, counted)

    def since(self) -> int:
        """Since it was last asked."""
        count, self.bytes = self.bytes, 0
        return count


def traffic(way: str, group, tokens: int, query_heads: int, key_value_heads: int, head_dim: int) -> torch.Tensor:
    """Bytes kept for the backward of one layer, and bytes that the rank sends in the forward and in the backward.

    The output is not counted: it is the next module's to keep.
    """
    shapes = ((query_heads, 2 * head_dim), (key_value_heads, 2 * head_dim), (key_value_heads, head_dim))
    order = torch.arange(tokens) if way == "allgather" else None
    inputs = [torch.zeros(tokens // group.size(), 1, *shape, requires_grad=True) for shape in shapes]

    def layer() -> torch.Tensor:
        """Nobody else holds queries, keys and values."""
        projected = [x * 1 for x in inputs]
        return context_parallel_attention(lambda *x: KernelThatKeepsItsInputs.apply(*x) * 1, *projected, group, order)

    with Held() as held:
        output = layer()
    forward = sent.since()
    gc.collect()
    kept = held.in_the_end() - output.nbytes
    output.sum().backward()
    return torch.tensor([kept, forward, sent.since()])


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    groups = {4: torch.distributed.group.WORLD}
    for pair in ([0, 1], [2, 3]):
        group_of_two = torch.distributed.new_group(pair)
        if rank in pair:
            groups[2] = group_of_two
    # For checkpointed cores, which restore the random state.
    tensor_parallel.random.initialize_rng_tracker()
    results, sent = {}, Sent()
    for size, process_group in groups.items():
        for chosen in ("a2a", "allgather"):
            for again in (False, True):
                # New ones for every case: gradients are kept in the tensors.
                computed = attention(load_file(directory / "inputs.safetensors"), chosen, process_group, again)
                results |= {f"{chosen}-{size}-{again}.{name}": value for name, value in computed.items()}
            sent.since()
            results[f"{chosen}-{size}.traffic"] = traffic(chosen, process_group, 256, 8, 4, 16)
    save_file({name: value.contiguous() for name, value in results.items()}, directory / f"rank{rank}.safetensors")
    torch.distributed.destroy_process_group()
