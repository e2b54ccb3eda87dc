"""Completes the loading of a checkpoint: restores state that Megatron does not load, and the run's progress."""

from argparse import Namespace
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import get_args

from neo_megatron.run.changes import saved_schedule
from neo_megatron.run.console import say
from neo_megatron.run.module_rates import START
from neo_megatron.run.optimizer_state import Loaded, load_masters, load_state, read_on_rank_0, saved_groups
from neo_megatron.run.pretrained_optimizer import take_over_state

# Keys of a saved parameter group that identify it among those of the run.
_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", START)


def after_loading(
    model: list[torch.nn.Module], optimizer: MegatronOptimizer | None, scheduler: OptimizerParamScheduler | None
) -> None:
    """Loads the optimizer state that `make_way` kept Megatron from loading. Collective: called on all ranks."""
    args = get_args()
    if args.resume_from is not None:
        _resume(args, model, optimizer, scheduler)
    elif args.started_from and optimizer is not None:
        if args.pretrained_optimizer:
            _say_on_rank_0(take_over_state(optimizer, model, args.started_from))
        elif args.bf16 or args.fp16:
            load_masters(optimizer, model, args.started_from, args.fp8_param_gather)


def packs_to_read(args: Namespace, iteration: int, consumed: int) -> int:
    """Packs that a run reads from its first step to its last, including those before a change of the batch size."""
    if args.train_samples:
        return args.train_samples
    return consumed + max(0, args.train_iters - iteration) * args.global_batch_size


def _resume(
    args: Namespace,
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
) -> None:
    _, common_state = read_on_rank_0(args.resume_from)
    if args.load_state_by_names:
        args.no_load_optim = False  # set before to keep Megatron from loading it
        if optimizer is not None:
            _say_on_rank_0(_sentence(args, load_state(optimizer, model, args.resume_from)))
            _place(args, scheduler, optimizer, common_state)
    elif args.no_load_optim and scheduler is not None:
        if optimizer is not None and (args.bf16 or args.fp16):
            load_masters(optimizer, model, args.resume_from, args.fp8_param_gather)
        _place(args, scheduler, optimizer, common_state)
        _say_on_rank_0("--no-load-optim: moments start at zero; iteration, consumed packs and schedule continue")
    if args.train_samples:  # earlier iterations may have had another batch size
        left = args.train_samples - args.consumed_train_samples
        args.train_iters = common_state["iteration"] + max(0, left) // args.global_batch_size


def _sentence(args: Namespace, loaded: Loaded) -> str:
    if not loaded.known and not loaded.fresh:
        return "--optimizer sgd without momentum keeps no state, and none was loaded"
    if not loaded.known:
        return (
            f"{args.resume_from} has no optimizer state (saved with --no-save-optim, or before any step was taken): "
            "moments start at zero"
        )
    fresh = f", zero for {loaded.fresh}" if loaded.fresh else ""
    steps = f" after {loaded.step} steps" if loaded.step else ""
    return (
        f"optimizer state of {args.resume_from}{steps}, on the first rank: loaded for {loaded.known} parameters{fresh}"
    )


def _place(
    args: Namespace, scheduler: OptimizerParamScheduler, optimizer: MegatronOptimizer, common_state: dict[str, Any]
) -> None:
    """Sets the schedule to the run's progress."""
    there = saved_schedule(args, common_state)
    if "num_steps" in there:
        steps = there["num_steps"]
    elif args.train_samples:
        steps = args.consumed_train_samples
    else:
        steps = common_state["iteration"] * args.global_batch_size
    if args.use_checkpoint_opt_param_scheduler and there:
        _keep_rates(optimizer, common_state)
        scheduler.load_state_dict(there)
    else:
        scheduler.load_state_dict({**scheduler.state_dict(), "num_steps": steps})
    scheduler.step(0)  # with all that was loaded


def _keep_rates(optimizer: MegatronOptimizer, common_state: dict[str, Any]) -> None:
    """Keeps the learning rates of the loaded parameter groups over those of the schedule."""
    rates = {
        tuple(group.get(name) for name in _GROUP): {name: group[name] for name in ("max_lr", "min_lr")}
        for group in saved_groups(common_state)
        if "max_lr" in group
    }
    for group in optimizer.param_groups:
        group.update(rates.get(tuple(group.get(name) for name in _GROUP), {}))


def _say_on_rank_0(sentence: str) -> None:
    if get_args().rank == 0:
        say(sentence)
