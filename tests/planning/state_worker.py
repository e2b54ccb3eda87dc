"""Builds ranks of large layouts as `pretrain_neo` would, on the meta device under a fake process group; counts bytes.

Arguments: a JSON list of {"argv": flags of pretrain_neo, "world_size": ranks, "ranks": those to build}. The last line
printed is the JSON list of [parameters, gradients, optimizer state] in bytes of every rank of every case.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install_training()

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.training import training
from torch.testing._internal.distributed.fake_pg import FakeStore

from neo_megatron.run import pretraining


class NamedAsCuda(torch.overrides.TorchFunctionMode):
    """Megatron's optimizers sort parameters by the name of their type, which on the meta device names that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.replace(".meta", "") if func is torch.Tensor.type and isinstance(result, str) else result


def storage_bytes(tensors) -> int:
    """Bytes of the storages under the tensors; views of one storage count once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def single(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers of a chain, which may be one of chains."""
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from single(part)
    else:
        yield optimizer


def rank_bytes(args: Namespace, rank: int) -> list[int]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    with torch.device("meta"):
        no_checkpoints, no_tiles = SimpleNamespace(start=lambda: None), SimpleNamespace(options=None)
        build = partial(pretraining.model_provider, run_checkpoints=no_checkpoints, tiles=no_tiles)
        chunks = training.get_model(build)
        config, _ = training.get_megatron_optimizer_config(args)
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
        parts = list(single(optimizer))
        for part in parts:
            part.init_state_fn(part.optimizer, part.config)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    held = {parameter.untyped_storage()._cdata for parameter in parameters}
    state = []
    for part in parts:
        trained_by = [p for group in part.optimizer.param_groups for p in group["params"]]
        state += [p for p in trained_by if p.untyped_storage()._cdata not in held]
        state += [value for entry in part.optimizer.state.values() for value in entry.values()]
    found = [
        storage_bytes(parameters),
        storage_bytes(buffer.grad_data for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers),
        storage_bytes(state),
    ]
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found


def case_bytes(case: dict) -> list[list[int]]:
    os.environ.update(WORLD_SIZE=str(case["world_size"]), RANK="0")
    sys.argv = ["pretrain_neo", *case["argv"], "--no-initialization"]
    args = pretraining.parse_arguments()
    found = [rank_bytes(args, rank) for rank in case["ranks"]]
    training.destroy_global_state()
    return found


def main() -> None:
    cases = json.loads(sys.argv[1])
    torch.cuda.current_device = lambda: "meta"
    NamedAsCuda().__enter__()
    print(json.dumps([case_bytes(case) for case in cases]))


if __name__ == "__main__":
    main()
