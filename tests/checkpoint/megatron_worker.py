"""Loads a converted checkpoint into Megatron's model, then saves it as training does, with optimizer state.

python megatron_worker.py HF_DIR RELEASE_DIR OUT_DIR
"""

import dataclasses
import sys
from argparse import Namespace

import torch

from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.enums import AttnBackend

from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig


def main() -> None:
    hf_directory, release, out = sys.argv[1:]
    sizes = read_sizes(hf_directory)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = NeoModel(NeoConfig.from_sizes(sizes, transformer_impl="local", gradient_accumulation_fusion=False))

    wanted = model.sharded_state_dict()
    shapes = {value.key: tuple(value.global_shape) for value in wanted.values() if isinstance(value, ShardedTensor)} | {
        value.key: tuple(value.data.shape) for value in wanted.values() if hasattr(value, "build_fn")
    }
    assert shapes == {row.megatron: row.megatron_shape for row in tensor_table(sizes)}, shapes
    loaded = dist_checkpointing.load({"model": dict(wanted)}, release, strict="raise_all")
    model.load_state_dict(loaded["model"], strict=True)

    state = {
        "model": model.sharded_state_dict(),
        "args": Namespace(
            neo_sizes=dataclasses.asdict(sizes), attention_backend=AttnBackend.auto, params_dtype=torch.float32
        ),
        "optimizer": {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x.weight", torch.ones(7))},
        "iteration": 3,
    }
    dist_checkpointing.save(state, out)


if __name__ == "__main__":  # saving starts a process that imports this file
    main()
