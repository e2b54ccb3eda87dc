"""The optimizer's state of the stage before: `--pretrained-optimizer` adds it to what `--pretrained-checkpoint` loads.

Megatron starts from another run's checkpoint either with its model alone or, to go on, with everything: the optimizer's
state of exactly the parameters that train now, the schedule and the count of samples. A stage that trains more than the
one before it wants something between. Parameters that both train keep their moments (and their float32 copies, where
the model is in bf16), those that begin to train start with moments of zero, and all else starts as in a new run.
Adam's count of steps comes along too. It is one for all parameters, so that the new ones have no correction of their
young moments: with betas of 0.9 and 0.95 their first step is 2.2 times shorter than it would be.

State is found by the names of the parameters, so that any layout, and any of Megatron's Adam optimizers with or without
`--use-distributed-optimizer`, takes over from any other.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.model.config import ConfigError

STATE = "optimizer.state."
# What is kept of a parameter -> its names in checkpoints. The master is the float32 copy of a bf16 parameter, which the
# plain and the distributed optimizer name differently.
KINDS = {"exp_avg": ("exp_avg",), "exp_avg_sq": ("exp_avg_sq",), "master": ("fp32_param", "param")}


@dataclass(frozen=True)
class _State:
    """What this rank's optimizer holds of a parameter.

    Args:
        tensors: by `KINDS`; a master only where it is kept apart from the parameter.
        part: of the flattened parameter; the distributed optimizer holds a part on each rank.
    """

    tensors: dict[str, Tensor]
    part: slice


def check_flags(args: Namespace) -> None:
    """Raises ConfigError where `--pretrained-optimizer` has nothing to take state from, or no place to put it."""
    if not args.pretrained_optimizer:
        return
    if not args.pretrained_checkpoint:
        raise ConfigError("--pretrained-optimizer needs --pretrained-checkpoint, whose optimizer state it takes over")
    if args.optimizer != "adam" or args.optimizer_cpu_offload or args.use_megatron_fsdp:
        raise ConfigError(
            "--pretrained-optimizer takes over the state of --optimizer adam on the device, without "
            "--optimizer-cpu-offload and --use-megatron-fsdp: leave it out"
        )


@torch.no_grad()
def take_over_state(optimizer: MegatronOptimizer, model: list[torch.nn.Module], checkpoint: str | Path) -> str:
    """Fills the state of a new optimizer from a checkpoint. A call on all ranks, after the model was loaded.

    Args:
        model: this rank's chunks.
        checkpoint: a directory that ``--save`` has filled, or one iteration of it.

    Returns:
        A sentence that counts the parameters of this rank's chunks.

    Raises:
        ConfigError: the checkpoint has no state, or only one that fits its own layout.
    """
    saved = TorchDistDirectory(checkpoint)
    check_state(saved)
    sharded = dict(_sharded_parameters(model))
    optimizers = [o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if not o.is_stub_optimizer]
    for kind, names in KINDS.items():
        wanted = {}
        for parameter, entry in sharded.items():
            name = next((name for name in names if f"{STATE}{name}.{entry.key}" in saved.shapes), None)
            if name and parameter.requires_grad:
                empty = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                wanted[id(parameter)] = make_sharded_optimizer_tensor(entry, empty, STATE + name)
        loaded = dist_checkpointing.load(wanted, str(saved.directory))
        for one in optimizers:
            for parameter, state in _states(one):
                if id(parameter) in wanted and kind in state.tensors:
                    state.tensors[kind].copy_(loaded[id(parameter)].flatten()[state.part].view_as(state.tensors[kind]))
                    _write_back(one, parameter, state)
    step = _step(saved)
    for one in optimizers:
        _set_step(one, step)
    known = [f"{STATE}exp_avg.{entry.key}" in saved.shapes for p, entry in sharded.items() if p.requires_grad]
    return (
        f"optimizer state of {saved.directory} after {step} steps, on the first rank: taken over for {sum(known)} "
        f"parameters, zero for {len(known) - sum(known)} that begin to train"
    )


def check_state(saved: TorchDistDirectory) -> None:
    """Raises ConfigError where a checkpoint has no state to take over."""
    if any(key.startswith(STATE + "exp_avg.") for key in saved.shapes):
        return
    if any(key.startswith("optimizer.distributed.") for key in saved.shapes):
        raise ConfigError(
            f"--pretrained-optimizer: {saved.directory} holds its optimizer state by ranks, not by parameters: "
            "save it again with --dist-ckpt-optim-fully-reshardable, or leave the flag out"
        )
    raise ConfigError(
        f"--pretrained-optimizer: {saved.directory} has no optimizer state (converted, or saved with --no-save-optim): "
        "leave the flag out"
    )


def _sharded_parameters(
    model: list[torch.nn.Module],
) -> Iterator[tuple[Parameter, ShardedTensor | ShardedTensorFactory]]:
    """Every parameter with its name and its split in a checkpoint."""
    for chunk in unwrap_model(model):
        state, _ = extract_sharded_tensors_and_factories(chunk.sharded_state_dict())
        for entry in nested_values(state):
            if isinstance(entry.data, Parameter):
                yield entry.data, entry


def _states(optimizer: MegatronOptimizer) -> Iterator[tuple[Parameter, _State]]:
    """This rank's state of every parameter that it updates, allocated where it was not."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    whole = slice(None)
    if isinstance(optimizer, DistributedOptimizer):
        for parameter in optimizer.model_param_group_index_map:
            tensors = dict(optimizer._get_main_param_and_optimizer_states(parameter))
            held = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, _State({"master": tensors.pop("param"), **tensors}, slice(held.start, held.end))
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        groups = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameters, masters in groups:
            for parameter, master in zip(parameters, masters, strict=True):
                yield parameter, _State({"master": master.data, **_moments(inner.state[master])}, whole)
        for parameters in optimizer.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, _State(_moments(inner.state[parameter]), whole)
    else:
        for parameter in optimizer.get_parameters():
            yield parameter, _State(_moments(inner.state[parameter]), whole)


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}


def _write_back(optimizer: MegatronOptimizer, parameter: Parameter, state: _State) -> None:
    """The distributed optimizer may keep states in few bits; `_states` then gave copies of them."""
    if isinstance(optimizer, DistributedOptimizer):
        tensors = dict(state.tensors)
        optimizer._set_main_param_and_optimizer_states(parameter, {"param": tensors.pop("master"), **tensors})


def _step(saved: TorchDistDirectory) -> int:
    """Adam's count of steps, one for all parameters: in a group of them, or beside the groups."""
    state = saved.common_state()["optimizer"]
    state = state.get("optimizer", state)
    if "common_step" in state.get("state", {}):
        return int(state["state"]["common_step"])
    return max(int(group.get("step", 0)) for group in state["param_groups"])


def _set_step(optimizer: MegatronOptimizer, step: int) -> None:
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(step))
    else:
        for group in inner.param_groups:
            # A CUDA graph reads it on the device.
            group["step"] = (
                torch.tensor([step], dtype=torch.int, device="cuda") if optimizer.config.optimizer_cuda_graph else step
            )
