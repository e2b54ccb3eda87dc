"""Megatron-FSDP, patched so that it trains NEO, saves checkpoints for any layout, and runs on a CPU.

* Megatron saves it as `fsdp_dtensor`, which no other layout loads and nothing verifies or exports. Here a run saves and
  loads `torch_dist` as all others do: each rank the rows of parameters, and of their moments, that its shards hold.
* It returns its optimizer outside of Megatron's chain of optimizers, through which `steps.py` looks at gradients.
* It tells by the names of classes how a layer is divided over tensor-parallel ranks, and does not know NEO's.
* It wants the package einops to reshape one tensor.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.utils import unwrap_model
from megatron.training import training
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

_wrap = FullyShardedDataParallel.__init__
_optimizer_state, _copy_to_main = (
    DistributedOptimizer.sharded_state_dict,
    DistributedOptimizer._copy_model_params_to_main_params,
)
_get_optimizer = training.get_megatron_optimizer


@dataclass(frozen=True)
class Shard:
    """The rows of a parameter that this rank's shards hold.

    Attributes:
        main: the optimizer's parameter; its moments and its gradient have the same rows.
        rows: of ``main``, flat and of any length, 0 included.
        model: the same rows of the weight that is computed with; the tensor itself where both have one dtype.
        first: the first row, of those of this tensor-parallel rank.
    """

    main: Parameter
    rows: Tensor
    model: Tensor
    first: int


def complete(args: Namespace) -> None:
    """Sets what Megatron-FSDP needs, so that no user has to pass it."""
    # Megatron sets it later, and the plan and checks of the layout read it.
    args.use_distributed_optimizer = True
    # Without it, Megatron fails where some parameters are frozen and only optimizer state is sharded.
    args.overlap_grad_reduce = True
    # Kernels that add to gradients in a product would write to buffers that FSDP frees.
    args.gradient_accumulation_fusion = False


@contextmanager
def saved_as_torch_dist(args: Namespace) -> Iterator[None]:
    """Lets Megatron check its arguments, which it accepts with the other format alone."""
    patched = args.use_megatron_fsdp and args.ckpt_format == "torch_dist"
    if patched:
        args.ckpt_format = "fsdp_dtensor"
    try:
        yield
    finally:
        if patched:
            args.ckpt_format = "torch_dist"


def shards(model: FullyShardedDataParallel) -> dict[Parameter, Shard]:
    """The shard of every parameter on this rank, keyed by the parameter that the model computes with."""
    buffers = model.param_and_grad_buffer
    of_rank = {}
    for _, main in buffers.optimizer_named_parameters:
        parameter = main.orig_param
        weights = buffers.parameter_groups[buffers.param_to_param_group[parameter]].model_weight_buffer
        number = weights.param_idx[parameter]
        first, _ = weights._get_item_slice_in_shard(number)
        held = weights.get_item(number, only_shard=True)
        width = parameter.shape[1:].numel()
        of_rank[parameter] = Shard(main, main.data.to_local().flatten(), held, first // width)
    return of_rank


def sharded_parameters(model: FullyShardedDataParallel) -> dict[Parameter, ShardedTensor | ShardedTensorFactory]:
    """The place in a checkpoint of the rows that this rank holds, keyed by the optimizer's parameter."""
    held = shards(model)
    entries = ((held.get(entry.data), entry) for entry in _complete_state(model).values())
    return {shard.main: _rows_of(entry, shard) for shard, entry in entries if shard and shard.model.numel()}


def install_weights(model: FullyShardedDataParallel) -> None:
    """Makes the weights that are computed with those of the optimizer, after these were changed."""
    model.param_and_grad_buffer.copy_main_weights_to_model_weights()


def _init(model: FullyShardedDataParallel, *arguments: Any, **keywords: Any) -> None:
    _wrap(model, *arguments, **keywords)
    # Megatron calls it on what it takes for the model, without wrappers.
    model.module.sharded_state_dict = partial(_sharded_state_dict, model)


def _sharded_state_dict(model: FullyShardedDataParallel, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """The model's own, with the rows of this rank's shards in place of the parameters."""
    held = shards(model)
    sliced = {}
    for name, entry in _complete_state(model, *arguments, **keywords).items():
        shard = held.get(entry.data)
        if shard is None:
            sliced[name] = entry
        elif shard.model.numel():
            sliced[name] = _rows_of(entry, shard)
    return sliced


def _complete_state(model: FullyShardedDataParallel, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """The model's own state, of complete parameters, which may be without memory."""
    inner: MegatronFSDP = model.module
    distributed = inner.is_param_fsdp_distributed
    inner._replace_param_with_raw_if_needed()
    inner.is_param_fsdp_distributed = True  # or a hook would put the shards of DTensors into the state
    try:
        return unwrap_model(inner.module).sharded_state_dict(*arguments, **keywords)
    finally:
        inner.is_param_fsdp_distributed = False
        if distributed:
            inner._replace_param_with_distributed_if_needed()


def _rows_of(entry: ShardedTensor | ShardedTensorFactory, shard: Shard) -> ShardedTensor | ShardedTensorFactory:
    """The part of an entry that a shard holds, which this rank alone writes."""
    shape = entry.data.shape
    rows = shard.model.view(-1, *shape[1:])
    replica = (*entry.replica_id[:-1], 0)
    if isinstance(entry, ShardedTensorFactory):
        build = partial(_build_rows, entry, shape, shard.first)
        return replace(entry, data=rows, build_fn=build, merge_fn=_merge_rows, replica_id=replica)
    return _part(entry, rows, shard.first, entry.key, replica)


def _part(entry: ShardedTensor, rows: Tensor, first: int, key: str, replica: tuple[int, ...]) -> ShardedTensor:
    """``rows`` of an entry, from its row ``first`` on; shards are uneven, and axes of the layers are its own."""
    axis = entry.prepend_axis_num
    offset = list(entry.global_offset)
    offset[axis] += first
    data = rows[(None,) * axis]
    return replace(
        entry,
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=replica,
    )


def _build_rows(
    factory: ShardedTensorFactory, shape: torch.Size, first: int, key: str, rows: Tensor, replica: Any, *_: Any
) -> list[ShardedTensor]:
    """In place of a factory's function for all of the parameter: its tensors are ranges of the parameter's rows."""
    width = shape[1:].numel()
    built = []
    for entry in nested_values(
        factory.build_fn(key, torch.empty(shape, dtype=rows.dtype, device="meta"), replica, None)
    ):
        begin = entry.data.storage_offset() // width
        low, high = max(begin, first), min(begin + len(entry.data), first + len(rows))
        if low < high:
            part = rows[low - first : high - first]
            built.append(_part(entry, part, low - begin, entry.key, replica))
    return built


def _merge_rows(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _load_state_dict(model: FullyShardedDataParallel, state: dict[str, Any], strict: bool = True) -> None:
    """Takes what `_sharded_state_dict` has described, once it was read."""
    names = {parameter: name for name, parameter in _raw_names(model)}
    for parameter, shard in shards(model).items():
        if shard.rows.numel() and (strict or names[parameter] in state):
            shard.rows.copy_(state[names[parameter]].flatten())
    install_weights(model)


def _raw_names(model: FullyShardedDataParallel) -> Iterator[tuple[str, Parameter]]:
    inner: MegatronFSDP = model.module
    neo = unwrap_model(inner.module)
    prefix = next(name for name, module in inner.module.named_modules() if module is neo)
    for name, parameter in inner.raw_param.items():
        yield name.removeprefix(f"{prefix}." if prefix else ""), parameter


def _sharded_optimizer_state(
    optimizer: DistributedOptimizer,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    *arguments: Any,
    **keywords: Any,
) -> dict[str, Any]:
    """The state that Megatron's distributed optimizer saves in its format for any layout."""
    if not optimizer.ddp_config.use_megatron_fsdp:
        return _optimizer_state(optimizer, model_sharded_state_dict, is_loading, *arguments, **keywords)
    parts: dict[int, Any] = {}
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for model in optimizer.model_chunks:
        for main, entry in sharded_parameters(model).items():
            if main in trained:
                values = {"param": main, **optimizer.optimizer.state[main]}
                parts[len(parts)] = {
                    key: _optimizer_rows(entry, values[key], f"optimizer.state.{key}")
                    for key in ("param", *optimizer.optimizer_state_keys)
                }
    return {
        **optimizer.state_dict(),
        "param_state": parts,
        "param_state_sharding_type": "fully_reshardable",
    }


def _optimizer_rows(entry: Any, values: Tensor, prefix: str) -> ShardedTensor | ShardedTensorFactory:
    return make_sharded_optimizer_tensor(entry, values.detach().to_local().view(entry.data.shape), prefix)


def _copy_model_params_to_main_params(optimizer: DistributedOptimizer, *arguments: Any, **keywords: Any) -> None:
    """Megatron has none for FSDP, whose main weights are those that a checkpoint is loaded into."""
    if not optimizer.ddp_config.use_megatron_fsdp:
        _copy_to_main(optimizer, *arguments, **keywords)


@wraps(_get_optimizer)
def _chained_optimizer(*arguments: Any, **keywords: Any) -> MegatronOptimizer:
    optimizer = _get_optimizer(*arguments, **keywords)
    return optimizer if isinstance(optimizer, ChainedOptimizer) else ChainedOptimizer([optimizer])


def _parallelism(model: FullyShardedDataParallel, name: str, module: torch.nn.Module) -> str:
    """How a parameter is divided over tensor-parallel ranks, as Megatron and Transformer Engine mark it."""
    parameter = getattr(module, name)
    if not getattr(parameter, "tensor_model_parallel", False):
        return "replicated"
    return "column" if parameter.partition_dim == 0 else "row"


def _mesh(dp_cp_group: Any, tp_group: Any, ep_size: int = 1) -> Tensor:
    """Ranks as ``[data and context, tensor]``, of this rank's part of the experts; needs no package for that."""
    ranks = torch.arange(torch.distributed.get_world_size(), device="cpu")
    meshes = ranks.view(dp_cp_group.size(), -1, tp_group.size()).transpose(0, 1)
    return next(mesh for mesh in meshes if torch.distributed.get_rank() in mesh.flatten().tolist())


class CpuMesh:
    """In place of `DeviceMesh`, of ranks whose device is a CPU."""

    @staticmethod
    def from_group(groups: Any, device_type: str, **keywords: Any) -> DeviceMesh:
        return DeviceMesh.from_group(groups, "cpu", **keywords)


LINES = {
    mcore_fsdp_adapter: (
        "        self.param_and_grad_buffer = self.module.param_and_grad_buffer\n",
        "        self.module.load_state_dict(custom_state_dict, strict=strict)\n",
        "                detected_type = self._detect_parallelism_type(name, submodule)\n",
        "            mesh = _get_dp_tp_mesh(dp_cp_group, tp_group)\n",
    ),
    MegatronFSDP: (
        "        if not self.is_param_fsdp_distributed:\n            return\n",
        "        self.is_param_fsdp_distributed = True\n",
        "        self.raw_param = dict(self.module.named_parameters())\n",
    ),
    DistributedOptimizer: (
        'if self.ddp_config.use_megatron_fsdp and sharding_type != "fsdp_dtensor":\n            raise',
        '"Megatron-FSDP does not implement a model-to-main parameter update."\n',
    ),
    training: (
        "        optimizer = get_megatron_optimizer(\n",
        "                pg_collection=pg_collection if args.use_megatron_fsdp else None,\n",
    ),
}
PATCHES = (
    (FullyShardedDataParallel, "__init__", _init),
    (FullyShardedDataParallel, "load_state_dict", _load_state_dict),
    (FullyShardedDataParallel, "_detect_parallelism_type", _parallelism),
    (mcore_fsdp_adapter, "_get_dp_tp_mesh", _mesh),
    (DistributedOptimizer, "sharded_state_dict", _sharded_optimizer_state),
    (DistributedOptimizer, "_copy_model_params_to_main_params", _copy_model_params_to_main_params),
    (training, "get_megatron_optimizer", _chained_optimizer),
)
