"""Megatron's saving of the distributed optimizer, patched so that each rank holds only what it writes, on a GPU too.

In the format that any layout can load, Megatron gathers the state of all parameters, 12 bytes each, in the memory of
every host process, though each data-parallel rank then writes a share of it: 31 GB a process for NEO-2B. Here every
parameter has one rank that gathers and writes it. What is stored is the same.
"""

import heapq
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

_megatrons = DistributedOptimizer.sharded_param_state_fully_reshardable
_PREFIX = "optimizer.state"
_MOST = 1 << 28  # float32 values that are gathered at once: 1 GiB of GPU memory


def sharded_param_state_fully_reshardable(
    optimizer: DistributedOptimizer,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, Any] | None:
    """As Megatron's, but to save, a rank gets the parameters alone that it writes. Collective."""
    if is_loading or (metadata or {}).get("distrib_optim_fully_reshardable_mem_efficient"):
        return _megatrons(optimizer, model_sharded_state_dict, is_loading, metadata)
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    entries = {entry.data: entry for entry in nested_values(sharded)}
    parameters = [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]
    ranks = optimizer.data_parallel_group.size()
    writers = share_out([parameter.numel() for parameter in parameters], ranks)
    mine = {
        parameter: number
        for number, (parameter, writer) in enumerate(zip(parameters, writers, strict=True))
        if writer == optimizer.data_parallel_group.rank()
    }
    state: dict[int, Any] = {number: {} for number in mine.values()}
    for key in ("param", *optimizer.optimizer_state_keys):
        for parameter, values in _gather(optimizer, key, mine).items():
            entry = entries[parameter]
            values = values.view(entry.data.shape)
            # This rank writes it, whichever data-parallel rank it is.
            changes = {"key": f"{_PREFIX}.{key}.{entry.key}", "replica_id": (*entry.replica_id[:-1], 0)}
            if not isinstance(entry, ShardedTensorFactory):
                changes["dtype"] = values.dtype
            state[mine[parameter]][key] = replace(entry, data=values, **changes)
            state[mine[parameter]][key].validate_metadata_integrity()
    return state


def share_out(sizes: list[int], ranks: int) -> list[int]:
    """The rank that takes each of these sizes: the largest first, each to the rank with the least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    takers = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        load, takers[number] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[number], takers[number]))
    return takers


def _gather(optimizer: DistributedOptimizer, key: str, mine: dict[Parameter, int]) -> dict[Parameter, Tensor]:
    """One kind of state, complete and flat in host memory, of the parameters that this rank writes."""
    gathered = {p: torch.empty(p.numel(), dtype=torch.float32, device="cpu") for p in mine}
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (of_buckets,) = ranges.values()
        for bucket, of_bucket in zip(buffer.buckets, of_buckets, strict=True):
            shard = _shard(optimizer, key, bucket, of_bucket["param_map"])
            spans = {p: span for p, span in bucket.param_to_index.items() if p in mine}
            _exchange(shard, optimizer.data_parallel_group, spans, gathered)
    return gathered


def _shard(optimizer: DistributedOptimizer, key: str, bucket: Any, ranges: dict[Parameter, Any]) -> Tensor:
    """This rank's part of a bucket, as it lies there, with zeros between parameters."""
    ranks = optimizer.data_parallel_group.size()
    shard = torch.zeros(bucket.grad_data.numel() // ranks, dtype=torch.float32, device=torch.cuda.current_device())
    for parameter, held in ranges.items():
        values = optimizer._get_main_param_and_optimizer_states(parameter)[key]
        shard[held["gbuf_local"].start : held["gbuf_local"].end].copy_(values.detach())
    return shard


def _exchange(
    shard: Tensor,
    group: torch.distributed.ProcessGroup,
    spans: dict[Parameter, tuple[int, int]],
    gathered: dict[Parameter, Tensor],
) -> None:
    """Copies parameters from the shards of all ranks.

    Args:
        shard: this rank's, as long as all others.
        spans: where parameters begin and end in the bucket.
        gathered: is filled.
    """
    ranks, length = group.size(), len(shard)
    columns = max(1, _MOST // ranks)
    for first in range(0, length, columns):
        part = shard[first : first + columns]
        parts = part.new_empty(ranks * len(part))
        torch.distributed.all_gather_into_tensor(parts, part.contiguous(), group=group)
        for parameter, (begin, end) in spans.items():
            for rank in range(begin // length, -(-end // length)):
                there = rank * length + first  # of the part's first value in the bucket
                low, high = max(begin, there), min(end, there + len(part))
                if low < high:
                    place = rank * len(part) - there
                    gathered[parameter][low - begin : high - begin].copy_(parts[low + place : high + place])


PATCHED = DistributedOptimizer
LINES = (
    "param_state = self.sharded_param_state_fully_reshardable(\n",
    "key=f'{prefix}.{state_key}.{sharded_metadata.key}',\n",
    'for model_param, param_range_map in gbuf_range_map["param_map"].items():\n',
    'gbuf_local_start = param_range_map["gbuf_local"].start\n',
    'for key in ("param",) + self.optimizer_state_keys\n',
)
PATCHES = ((DistributedOptimizer, "sharded_param_state_fully_reshardable", sharded_param_state_fully_reshardable),)
