"""Megatron's patched saving: the processes that it starts."""

import psutil
import torch

from neo_megatron.megatron_compat import cpu_platform


def test_a_synchronous_save_starts_no_process(megatron, tmp_path):
    cpu_platform.install_training()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    weight = torch.arange(6.0).reshape(2, 3)
    before = psutil.Process().children(recursive=True)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        dist_checkpointing.save({"weight": ShardedTensor.from_rank_offsets("weight", weight)}, str(tmp_path / name))
        loaded = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2, 3))}
        assert torch.equal(dist_checkpointing.load(loaded, str(tmp_path / name))["weight"], weight)
    assert psutil.Process().children(recursive=True) == before
