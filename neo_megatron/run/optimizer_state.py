"""Loads optimizer state by parameter names, also into another wrapper or precision of the same optimizer.

Megatron loads the state that its own optimizer of the same wrapper and precision has saved, together with its
hyperparameters, and fails or loads wrongly otherwise; it cannot load that of SGD. Here every parameter gets its moments
and, where the optimizer keeps a float32 copy apart from the model (the master weight), exactly that copy: of the
checkpoint's optimizer, or of the weights of a model in float32. Hyperparameters stay those of the command line. Muon
keeps one moment of each matrix, and AdamW keeps two of each other parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.megatron_compat import fsdp
from neo_megatron.run.ranks import on_rank_0

STATE = "optimizer.state."
_ADAM = ("exp_avg", "exp_avg_sq")
_MOMENTUM = ("momentum_buffer",)
_MOMENTS = (*_ADAM, *_MOMENTUM)
_TORCH_ADAM = (torch.optim.AdamW, torch.optim.Adam)
# The plain and the distributed optimizer name a master weight differently; the last one is the model's own weight.
_MASTERS = (f"{STATE}fp32_param.", f"{STATE}param.", "")


@dataclass(frozen=True)
class Loaded:
    """Optimizer state that was loaded on this rank.

    Args:
        known, fresh: how many of the parameters that train have moments in the checkpoint, and how many do not.
        step: Adam's count of steps; 0 for SGD, which does not count.
    """

    known: int
    fresh: int
    step: int


@dataclass(frozen=True)
class _State:
    """The part of a parameter that this rank's optimizer holds.

    Args:
        tensors: the moments and "master", the latter only where it is kept apart from the parameter.
        part: range of the flattened parameter that this rank holds; all of it without the distributed optimizer.
    """

    tensors: dict[str, Tensor]
    part: slice


def has_moments(saved: TorchDistDirectory) -> bool:
    """Whether a checkpoint has state of an optimizer by the names of parameters."""
    return any(key.startswith(f"{STATE}{moment}.") for moment in _MOMENTS for key in saved.shapes)


def is_by_ranks(saved: TorchDistDirectory) -> bool:
    """Whether a checkpoint's optimizer state fits only the parallel layout that saved it."""
    return any(key.startswith("optimizer.distributed.") for key in saved.shapes)


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, model: list[torch.nn.Module], checkpoint: str | Path) -> Loaded:
    """Fills an optimizer from a checkpoint. Collective: called on all ranks, after the model was loaded.

    Moments that the checkpoint lacks are zero. Parameters in float32 become the checkpoint's masters.

    Args:
        model: this rank's chunks.
        checkpoint: one iteration.
    """
    saved, common_state = read_on_rank_0(checkpoint)
    sharded = {p: entry for p, entry in _sharded_parameters(model) if p.requires_grad}
    optimizers = list(_single(optimizer))
    states = [(one, p, state) for one in optimizers for p, state in _states(one)]
    kept = _kept(optimizer.config)
    for moment in kept:
        values = _read(saved, sharded, (f"{STATE}{moment}.",))
        for one, parameter, state in states:
            if moment in state.tensors:
                _fill(one, parameter, state, moment, values.get(parameter))
    masters = _read(saved, sharded, _MASTERS)
    _fill_masters(states, masters)
    for parameter, value in masters.items():
        if parameter.dtype == torch.float32 and not isinstance(parameter, DTensor):
            parameter.copy_(value)
    _install(model)
    common = saved_optimizers(common_state)
    step = max((_step(state) for state in common), default=0)
    for one in optimizers:
        _set_step(one, step)
        scaler = next((state["grad_scaler"] for state in common if "grad_scaler" in state), None)
        if scaler is not None and getattr(one, "grad_scaler", None) is not None:
            one.grad_scaler.load_state_dict(scaler)
    known = sum(any(f"{STATE}{moment}.{entry.key}" in saved.shapes for moment in kept) for entry in sharded.values())
    return Loaded(known, len(sharded) - known if kept else 0, step)


@torch.no_grad()
def load_masters(
    optimizer: MegatronOptimizer, model: list[torch.nn.Module], checkpoint: str | Path, quantized: bool
) -> None:
    """Makes master weights the weights of a checkpoint, bit for bit. Collective: called after the model was loaded.

    Megatron copies them from the model's parameters, which have lost bits where they are kept in FP8, or in bf16 while
    the checkpoint is in float32.

    Args:
        model: this rank's chunks.
        checkpoint: one iteration.
        quantized: whether the model's parameters are kept in FP8.
    """
    saved, _ = read_on_rank_0(checkpoint)
    stored = {saved.dtype(key) for key in saved.shapes if not key.startswith("optimizer.")}
    if not quantized and stored <= {optimizer.config.params_dtype}:
        return
    sharded = {p: entry for p, entry in _sharded_parameters(model) if p.requires_grad}
    masters = _read(saved, sharded, ("",))
    _fill_masters([(one, p, state) for one in _single(optimizer) for p, state in _states(one)], masters)
    _install(model)


def allocate_moments(optimizer: MegatronOptimizer | None) -> None:
    """Allocates the moments of parameters that no step has updated yet, as after skipped steps.

    Megatron's distributed optimizer cannot be saved without them.
    """
    for one in getattr(optimizer, "chained_optimizers", ()):
        if not isinstance(one, DistributedOptimizer) or one.is_stub_optimizer or one.init_state_fn is None:
            continue
        if not isinstance(one.optimizer, _TORCH_ADAM):  # which cannot continue from moments without a count of steps
            one.init_state_fn(one.optimizer, one.config)


def read_on_rank_0(checkpoint: str | Path) -> tuple[TorchDistDirectory, dict[str, Any]]:
    """The table of a checkpoint's tensors, and everything in it that is not a tensor. Collective."""

    def read() -> tuple[TorchDistDirectory, dict[str, Any]]:
        saved = TorchDistDirectory(checkpoint)
        return saved, saved.common_state()

    return on_rank_0(read)


def saved_optimizers(common_state: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything but tensors that a checkpoint holds of its optimizers: of one, or of several under their numbers."""
    state = common_state.get("optimizer", {})
    if state and all(isinstance(key, int) for key in state):
        return list(state.values())
    return [state] if state else []


def saved_groups(common_state: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups of a checkpoint's optimizers: their hyperparameters."""
    states = (state.get("optimizer", state) for state in saved_optimizers(common_state))
    return [group for state in states for group in state.get("param_groups", ())]


def _read(
    saved: TorchDistDirectory,
    sharded: dict[Parameter, ShardedTensor | ShardedTensorFactory],
    prefixes: tuple[str, ...],
) -> dict[Parameter, Tensor]:
    """This rank's part of one tensor per parameter, the first of the names that the checkpoint has."""
    wanted = {}
    for parameter, entry in sharded.items():
        prefix = next((prefix for prefix in prefixes if f"{prefix}{entry.key}" in saved.shapes), None)
        if prefix is not None:
            key = f"{prefix}{entry.key}"
            empty = torch.empty(entry.data.shape, dtype=saved.dtype(key), device="cpu")
            wanted[id(parameter)] = make_sharded_optimizer_tensor(entry, empty, "")
            wanted[id(parameter)].key = key
    # Each data-parallel rank reads a share and gets the rest from the others.
    ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), ranks)
    loaded = dist_checkpointing.load(wanted, str(saved.directory), strategy)
    return {p: loaded[id(p)] for p in sharded if id(p) in wanted}  # the checkpoint also has the common state


def _fill(optimizer: MegatronOptimizer, parameter: Parameter, state: _State, kind: str, value: Tensor | None) -> None:
    target = state.tensors[kind]
    if value is None:
        target.zero_()
    else:
        target.copy_(value.flatten()[state.part].view_as(target))
    if isinstance(optimizer, DistributedOptimizer) and not optimizer.ddp_config.use_megatron_fsdp:
        # Moments may be stored in a low precision; `_states` returned copies of them then.
        tensors = dict(state.tensors)
        optimizer._set_main_param_and_optimizer_states(parameter, {"param": tensors.pop("master"), **tensors})


def _fill_masters(states: list[tuple[MegatronOptimizer, Parameter, _State]], masters: dict[Parameter, Tensor]) -> None:
    for one, parameter, state in states:
        if "master" in state.tensors and parameter in masters:
            _fill(one, parameter, state, "master", masters[parameter])


def _install(model: list[torch.nn.Module]) -> None:
    """Makes the weights of Megatron-FSDP those of its optimizer; other optimizers share or keep both."""
    for chunk in model:
        if isinstance(chunk, FullyShardedDataParallel):
            fsdp.install_weights(chunk)


def _sharded_parameters(
    model: list[torch.nn.Module],
) -> Iterator[tuple[Parameter, ShardedTensor | ShardedTensorFactory]]:
    """Every parameter with its name and its split in a checkpoint; with FSDP those that this rank holds rows of."""
    for wrapped, chunk in zip(model, unwrap_model(model), strict=True):
        if isinstance(wrapped, FullyShardedDataParallel):
            yield from fsdp.sharded_parameters(wrapped).items()
            continue
        state, _ = extract_sharded_tensors_and_factories(chunk.sharded_state_dict())
        for entry in nested_values(state):
            if isinstance(entry.data, Parameter):
                yield entry.data, entry


def _states(optimizer: MegatronOptimizer) -> Iterator[tuple[Parameter, _State]]:
    """This rank's state of every parameter that it updates; missing moments are allocated."""
    _allocate(optimizer)
    all_of_it = slice(None)
    if isinstance(optimizer, DistributedOptimizer) and optimizer.ddp_config.use_megatron_fsdp:
        for parameter in optimizer.get_parameters():
            moments = {name: tensor.to_local() for name, tensor in _held(optimizer, parameter).items()}
            yield parameter, _State({"master": parameter.data.to_local(), **moments}, all_of_it)
    elif isinstance(optimizer, DistributedOptimizer):
        for parameter in optimizer.model_param_group_index_map:
            tensors = dict(optimizer._get_main_param_and_optimizer_states(parameter))
            held = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, _State({"master": tensors.pop("param"), **tensors}, slice(held.start, held.end))
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        groups = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameters, masters in groups:
            for parameter, master in zip(parameters, masters, strict=True):
                yield parameter, _State({"master": master.data, **_held(optimizer, master)}, all_of_it)
        for parameters in optimizer.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, _State(_held(optimizer, parameter), all_of_it)
    else:
        for parameter in optimizer.get_parameters():
            yield parameter, _State(_held(optimizer, parameter), all_of_it)


def _single(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers of a chain, which may be one of chains, that update anything."""
    if isinstance(optimizer, ChainedOptimizer):
        for one in optimizer.chained_optimizers:
            yield from _single(one)
    elif not optimizer.is_stub_optimizer:
        yield optimizer


def _kept(config: OptimizerConfig) -> tuple[str, ...]:
    """The moments that a run keeps, each of some parameters; SGD without momentum keeps none."""
    if config.optimizer == "sgd":
        return _MOMENTUM if config.sgd_momentum else ()
    return _MOMENTS if config.optimizer == "muon" else _ADAM


def _moments(optimizer: MegatronOptimizer) -> tuple[str, ...]:
    """The moments that one optimizer keeps of each of its parameters."""
    if optimizer.config.optimizer == "muon":
        return _MOMENTUM if isinstance(optimizer.optimizer, TensorParallelMuon) else _ADAM
    return _kept(optimizer.config)


def _held(optimizer: MegatronOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {moment: optimizer.optimizer.state[parameter][moment] for moment in _moments(optimizer)}


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Allocates the moments of every parameter; Megatron cannot do so for SGD."""
    inner = optimizer.optimizer
    if optimizer.init_state_fn is not None:
        optimizer.init_state_fn(inner, optimizer.config)
        return
    for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
        for moment in _moments(optimizer):
            inner.state[parameter].setdefault(moment, torch.zeros_like(parameter))


def _step(state: dict[str, Any]) -> int:
    """Adam's count of steps, one for all parameters: in a group of them, or outside the groups."""
    state = state.get("optimizer", state)
    if "common_step" in state.get("state", {}):
        return int(state["state"]["common_step"])
    return max((int(group.get("step", 0)) for group in state.get("param_groups", ())), default=0)


def _set_step(optimizer: MegatronOptimizer, step: int) -> None:
    inner = optimizer.optimizer
    if "exp_avg" not in _moments(optimizer):  # Adam alone counts steps
        return
    if isinstance(inner, _TORCH_ADAM):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(step))
    else:
        for group in inner.param_groups:
            group["step"] = step
