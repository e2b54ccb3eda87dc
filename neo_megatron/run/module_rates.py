"""Learning rates of single modules: `--lr-scale`, and `--unfreeze` from a step on.

Both are parameter groups of Megatron's optimizer. A module that is to be unfrozen has gradients and optimizer state
from the start, so that no buffer and no checkpoint changes in the middle of a run: before its step, its reduced
gradients are made zero and its learning rate is 0.
"""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import Parameter

from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.freeze import module_names

START = "unfreeze_step"  # key of a parameter group, and attribute of a parameter
_SCALE = "lr_scale"


def scales(text: str) -> dict[str, float]:
    """``--lr-scale`` as factors by module. Raises ConfigError if it cannot be read."""
    return dict(_entries("--lr-scale", text, "=", float, "post_llm=0.1", 0))


def starts(text: str) -> dict[str, int]:
    """``--unfreeze`` as numbers of steps by module. Raises ConfigError if it cannot be read."""
    return dict(_entries("--unfreeze", text, "@", int, "post_llm@2000", 1))


def _entries(flag: str, text: str, sign: str, kind: type, example: str, least: float) -> Iterator[tuple[str, Any]]:
    seen = set()
    for entry in text.replace(",", " ").split():
        name, found, number = entry.partition(sign)
        try:
            value = kind(number)
        except ValueError:
            found = ""
        if not (name and found):
            raise ConfigError(f"{flag} {entry!r} is not of the form {example}: write a module, {sign!r} and a number")
        if not least <= value < math.inf or value == 0:
            raise ConfigError(f"{flag} {entry!r}: give a number above 0")
        if name in seen:
            raise ConfigError(f"{flag} names {name} twice: give one number")
        seen.add(name)
        yield name, value


def rate_refusals(args: Namespace, sizes: NeoSizes) -> Iterator[str]:
    """A sentence for everything in the two flags that cannot work, before a model is built.

    Raises:
        ConfigError: a flag cannot be read.
    """
    factors, late = scales(args.lr_scale), starts(args.unfreeze)
    parts = ["patch_embedding", "embedding", "pre_buffer", "post_llm", "decoder", "output_layer"]
    absent = {"pre_buffer": not sizes.pre_buffer_layers, "output_layer": sizes.tie_word_embeddings}
    parts = [part for part in parts if not absent.get(part)]
    for flag, names in (("--lr-scale", factors), ("--unfreeze", late)):
        for name in names:
            if name.split(".")[0] not in parts:
                why = " (tied to embedding)" if name.startswith("output_layer") else ""
                yield f"{flag} {name}: this model has no such module{why}; its parts are {', '.join(parts)}"
    if (factors or late) and args.skip_train:
        yield "--lr-scale and --unfreeze are for training, and --skip-train only evaluates: leave them out"
    if (factors or late) and args.use_megatron_fsdp:
        yield "--lr-scale and --unfreeze are not for --use-megatron-fsdp, which has other parameters: leave one out"
    if factors and args.decoupled_lr is not None:
        yield "--lr-scale and --decoupled-lr both set the rate of embeddings: give embedding and output_layer a scale"
    if factors and args.lr_warmup_init:
        yield "--lr-scale multiplies rates that warm up from 0: leave --lr-warmup-init out"
    if late and args.training_stage != 1:
        yield f"--unfreeze: --training-stage {args.training_stage} trains everything from its first step; leave it out"
    for name, step in late.items():
        if name in ("patch_embedding", "pre_buffer"):
            yield f"--unfreeze {name}: --training-stage 1 trains it from its first step; leave it out"
        if args.train_iters and step >= args.train_iters:
            yield f"--unfreeze {name}@{step}: the run ends after {args.train_iters} steps; give an earlier one"


def stage_at_work(args: Namespace) -> int:
    """The training stage whose operations and memory the run has: of everything, once anything is to be unfrozen."""
    return 2 if args.unfreeze else args.training_stage


def group_overrides(args: Namespace, config: OptimizerConfig) -> dict[ParamKey, dict[str, Any]]:
    """Entries of the parameter groups of marked parameters, in place of the optimizer's own numbers."""
    keys = {}
    for factor in set(scales(args.lr_scale).values()) - {1.0}:
        rates = {"max_lr": config.lr * factor, "min_lr": config.min_lr * factor, "lr_mult": factor}
        keys[_marked(_SCALE, factor)] = rates
    for step in set(starts(args.unfreeze).values()):
        keys[_marked(START, step)] = {START: step}
    return keys


def _marked(attribute: str, value: float) -> ParamKey:
    def matches(parameter: Parameter, _: str) -> bool:
        return getattr(parameter, attribute, None) == value

    return ParamKey(with_name_predicate=ParamWithNamePredicate(f"{attribute}={value}", matches))


class ModuleRates:
    """The two flags at work in a process."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._scales, self._starts = scales(args.lr_scale), starts(args.unfreeze)
        self._found: set[str] = set()  # names of the flags that parameters of this rank have
        self._late: list[Parameter] = []
        self._optimizer: MegatronOptimizer | None = None
        self._scheduler: OptimizerParamScheduler | None = None

    def mark(self, model: torch.nn.Module) -> None:
        """Marks the parameters of a `NeoModel` that is frozen for its stage, and lets those train that will."""
        for name, parameter in module_names(model):
            if (scaled := _longest(self._scales, name)) is not None:
                self._found.add(f"--lr-scale {scaled}")
                parameter.lr_scale = self._scales[scaled]
            late = _longest(self._starts, name)
            if late is not None and not parameter.requires_grad:
                self._found.add(f"--unfreeze {late}")
                parameter.unfreeze_step = self._starts[late]
                parameter.requires_grad_(True)
                self._late.append(parameter)

    def take(self, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
        """To be called with both before the first step. Collective: called on all ranks.

        Raises:
            ConfigError: a name fits no parameter of the model, or none that is frozen.
        """
        found: list[set[str]] = [set()] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self._found)
        there = set().union(*found)
        for flag, names in (("--lr-scale", self._scales), ("--unfreeze", self._starts)):
            for name in names:
                if f"{flag} {name}" not in there:
                    kind = "frozen parameter" if flag == "--unfreeze" else "parameter"
                    raise ConfigError(
                        f"{flag} {name}: the model has no {kind} of this name or below it; the list of trained "
                        "parameters above has the names"
                    )
        self._optimizer, self._scheduler = optimizer, scheduler

    def begin_step(self) -> None:
        """Sets the rates of groups that train from a step on. To be called before each training step."""
        if not self._starts or self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            if (start := group.get(START)) is None:
                continue
            factor = self._factor(start, group.get("optimizer", self._args.optimizer))
            rate, decay = self._scheduler.get_lr(group), self._scheduler.get_wd(group) * group["wd_mult"]
            group["lr"] = rate * factor
            group["weight_decay"] = decay / factor if factor else 0.0

    def _factor(self, start: int, optimizer: str) -> float:
        """Of the learning rate: 0 before the step, then Adam's correction of moments that began there.

        Megatron counts Adam's steps once for all parameters and so corrects these as if their moments had run for
        long: with a beta2 of 0.999 the first updates would be up to six times too large. The factor puts the
        correction by their own count in its place (Kingma and Ba, arXiv 1412.6980, algorithm 1).
        """
        args = self._args
        done = args.curr_iteration
        if done < start:
            return 0.0
        if optimizer != "adam":
            return 1.0
        fresh = args.iteration if args.no_load_optim else 0  # where all moments began
        steps, own = done - fresh + 1, done - max(start, fresh) + 1
        return _correction(args, own) / _correction(args, steps)

    def hold_gradients(self) -> None:
        """Makes reduced gradients zero that must not count yet. To be called before they are clipped."""
        for parameter in self._late:
            if self._args.curr_iteration < parameter.unfreeze_step:
                parameter.main_grad.zero_()

    def scalars(self) -> dict[str, float]:
        """The scaled learning rates of the next step, to log."""
        if self._scheduler is None:
            return {}
        peak, lowest = self._args.lr, self._args.min_lr
        return {
            f"learning-rate/{name}": self._scheduler.get_lr({"max_lr": peak * factor, "min_lr": lowest * factor})
            for name, factor in self._scales.items()
        }


def _longest(names: Iterable[str], parameter: str) -> str | None:
    fitting = [name for name in names if parameter == name or parameter.startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


def _correction(args: Namespace, steps: int) -> float:
    return math.sqrt(1 - args.adam_beta2**steps) / (1 - args.adam_beta1**steps)
