"""Compares the flags of a resumed run with those of its checkpoint: each change is refused or honoured, and reported.

Megatron asserts a few sizes and ignores the rest, or replaces flags of the command line by what was saved.
"""

import dataclasses
import hashlib
import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.training.training import get_optimizer_param_scheduler

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.packs.mixture_schedule import open_streams
from neo_megatron.errors import ConfigError
from neo_megatron.model.config import completed_sizes
from neo_megatron.run.optimizer_state import has_moments, is_by_ranks

# Flags that change the samples or the update from here on, and what the change means.
_TOLD = {
    "train_packs": "--train-data-path: the run continues after the same number of packs of the new ones",
    "recipe": "",
    "seed": "samples come in another order from here on, some again and others not in this epoch",
    "loss_weighting": "",
    "min_jpeg_quality": "",
    "global_batch_size": "the schedule continues from its position",
    "adam_beta1": "",
    "adam_beta2": "",
    "adam_eps": "",
    "sgd_momentum": "",
    "muon_momentum": "",
    "muon_nesterov": "",
    "muon_split_qkv": "--muon-no-split-qkv",
    "muon_scale_mode": "",
    "muon_extra_scale_factor": "",
    "muon_coefficient_type": "",
    "muon_num_ns_steps": "",
    "muon_fp32_matmul_prec": "",
    "clip_grad": "",
    "bf16": "",
    "fp16": "",
}
_SCHEDULE_FLAGS = {"max_lr": "--lr", "min_lr": "--min-lr", "lr_decay_style": "--lr-decay-style"}


def identity_of_packs(location: str) -> str | list[dict[str, Any]]:
    """A hash of the content of packs: equal for copies at any path, different for other samples or another order.

    For a mixture, its phases: ``from``, and ``packs`` with the counts of each hash.
    """
    streams, schedule = open_streams(location)
    identities = list(map(_identity, streams))
    if schedule is None:
        return identities[0]
    return [
        {"from": phase.start, "packs": {one: n for one, n in zip(identities, phase.counts, strict=True) if n}}
        for phase in schedule.phases
    ]


def _identity(packs: PackIndex) -> str:
    content = {
        "files": packs.manifest["files"],
        "data": [entry["sha256"] for entry in packs.manifest["data"]],
        "seq_length": packs.sequence_length,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_model(args: Namespace, common_state: dict[str, Any], checkpoint: Path) -> None:
    """Raises ConfigError where a checkpoint is of another model than the run."""
    saved = completed_sizes(common_state["args"].neo_sizes)
    # The other fields are limits and labels, which may differ between runs.
    free = {"min_pixels", "max_pixels", "max_positions", "max_positions_hw"}
    sizes = {name: value for name, value in args.neo_sizes.items() if name not in free}
    if differences := _differences(saved, sizes):
        raise ConfigError(
            f"the checkpoint {checkpoint} is of another model ({differences}): "
            "choose --neo-model and the size flags that it was made with"
        )


def check_training(args: Namespace, common_state: dict[str, Any], checkpoint: Path) -> None:
    """Compares stage, optimizer and schedule of a resumed run with those of its checkpoint.

    Raises:
        ConfigError: the run would change what it trains, or its schedule without a flag that says so.
    """
    if args.no_load_optim:
        return
    saved = common_state["args"]
    if (saved.training_stage == 1) != (args.training_stage == 1):  # stages 2 and 3 both train everything
        raise ConfigError(
            f"the checkpoint {checkpoint} is of --training-stage {saved.training_stage} and this run, which resumes "
            f"from it, of {args.training_stage}: to begin a stage, give it as --pretrained-checkpoint, with "
            "--pretrained-optimizer to keep the optimizer's state, and another --load and --save"
        )
    if saved.optimizer != args.optimizer:
        raise ConfigError(
            f"the checkpoint {checkpoint} holds the state of --optimizer {saved.optimizer}, this run has "
            f"{args.optimizer}: add --no-load-optim to resume with the weights and the schedule alone"
        )
    if args.override_opt_param_scheduler:
        return
    for name, flag in (("lr_scale", "--lr-scale"), ("unfreeze", "--unfreeze")):
        there = getattr(saved, name, "")
        if there != getattr(args, name):
            raise ConfigError(
                f"the checkpoint {checkpoint} is of a run with {flag} {there!r}, not {getattr(args, name)!r}: give it "
                "the same, or add --override-opt-param-scheduler to follow the new one from here on"
            )
    if args.use_checkpoint_opt_param_scheduler:
        return
    if differences := _differences(saved_schedule(args, common_state), _schedule(args), _SCHEDULE_FLAGS):
        raise ConfigError(
            f"the checkpoint {checkpoint} follows another schedule (in packs: {differences}), as after a change of "
            "--train-iters, --lr, --weight-decay or --recipe: add --override-opt-param-scheduler to follow the new one "
            "from here on, or --use-checkpoint-opt-param-scheduler to keep the old one"
        )


def saved_schedule(args: Namespace, common_state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's schedule in packs of this run; empty where the checkpoint has none.

    Megatron counts packs. Where the flags count iterations, another global batch size leaves the run at the same
    iteration of the schedule, so all numbers of packs scale with it.
    """
    schedule = dict(common_state.get("opt_param_scheduler", {}))
    before = common_state["args"].global_batch_size
    if schedule and not args.train_samples and before != args.global_batch_size:
        for name in ("num_steps", "lr_warmup_steps", "lr_decay_steps", "wd_incr_steps"):
            schedule[name] = schedule[name] * args.global_batch_size / before
        schedule["num_steps"] = round(schedule["num_steps"])
    return schedule


def needs_state_by_names(args: Namespace, checkpoint: Path) -> bool:
    """Whether Megatron cannot load the optimizer's state itself, or would load hyperparameters with it, or too much.

    Of the distributed optimizer it would hold all of its data-parallel group's state in the memory of every process, 12
    bytes a parameter; by names one kind of state is held at a time.

    Raises:
        ConfigError: nor can this package load it.
    """
    saved = TorchDistDirectory(checkpoint)
    common_state = saved.common_state()
    there = common_state["args"]
    fields = [field.name for field in dataclasses.fields(OptimizerConfig) if hasattr(args, field.name)]
    changed = [name for name in [*fields, "global_batch_size"] if getattr(there, name, None) != getattr(args, name)]
    # A pipeline stage may hold nothing that trains in stage 1; Megatron looks for its state all the same.
    idle_stages = args.training_stage == 1 and args.pipeline_model_parallel_size > 1
    schedule_flags = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    # Megatron cannot load that of SGD, and that of Muon on the data-parallel ranks alone that saved it.
    if args.optimizer in ("sgd", "muon"):
        return True
    # Megatron finds parameter groups by a few of their numbers, which do not tell all of these apart.
    groups = any(getattr(one, name, "") for one in (there, args) for name in ("lr_scale", "unfreeze"))
    if has_moments(saved):
        return bool(changed or idle_stages or schedule_flags or groups or args.use_distributed_optimizer)
    if not is_by_ranks(saved):
        return True
    if groups or args.use_megatron_fsdp or {"use_distributed_optimizer", "bf16", "fp16"} & set(changed):
        raise ConfigError(
            f"the checkpoint {checkpoint} holds its optimizer state by ranks, not by parameters: resume with the "
            "precision and the optimizer that it was saved with, without --lr-scale and --unfreeze, or add "
            "--no-load-optim"
        )
    return False


def told_changes(args: Namespace, common_state: dict[str, Any]) -> list[str]:
    """Changes of a resumed run that a user should know about, one entry for each flag."""
    saved = common_state["args"]
    told = []
    for name, what in _TOLD.items():
        there, here = getattr(saved, name, None), getattr(args, name)
        if not hasattr(saved, name) or there == here:
            continue
        if name == "train_packs":
            told.append(_other_packs(there, here, saved.consumed_train_samples, what))
        else:
            told.append(f"{_flag(name)} {there} there, {here} here" + (what and f" ({what})"))
    return told


def _other_packs(there: object, here: object, consumed: int, what: str) -> str:
    """Says how other packs change a run that has consumed some: a mixture may change after them."""
    if not isinstance(there, list) or not isinstance(here, list):
        return f"other packs in {what}"
    done, doing = ([phase for phase in phases if phase["from"] < max(consumed, 1)] for phases in (there, here))
    if done == doing:
        first = min(phase["from"] for phase in (*there, *here) if phase not in there or phase not in here)
        return f"--mixture has other shares from pack {first} on, and every stream goes on where it is then"
    return (
        f"--mixture has other phases before pack {consumed}, where the run continues: streams are at other places, so "
        "samples may be repeated or left out in this epoch"
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _differences(there: dict[str, Any], here: dict[str, Any], flags: dict[str, str] | None = None) -> str:
    return "; ".join(
        f"{(flags or {}).get(name, name)} {_number(there[name])} there, {_number(value)} here"
        for name, value in here.items()
        if name in there and not _same(there[name], value)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, int | float):  # a share of a number of packs may be rounded
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and value else value


def _schedule(args: Namespace) -> dict[str, Any]:
    """The schedule that Megatron will build from the arguments; it also changes them, so they are restored."""
    before = dict(vars(args))
    schedule = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[])).state_dict()
    vars(args).clear()
    vars(args).update(before)
    return {name: value for name, value in schedule.items() if name != "num_steps"}
