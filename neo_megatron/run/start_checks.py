"""Checks that refuse a run before anything is built, shared by a start and its dry run.

`check_settings` needs the command line alone, `check_checkpoint` also what the run starts from.
"""

import copy
import importlib.util
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron.core.transformer.enums import AttnBackend
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from neo_megatron.errors import ConfigError
from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.model.core_attention import check_backend
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.packages import OPTIONAL, install
from neo_megatron.run.resume import check_model_and_schedule, check_way, choose_checkpoint


def check_settings(args: Namespace) -> None:
    """Checks flags that Megatron itself checks only long after the start.

    Raises:
        ConfigError: with the flag and a remedy.
    """
    _check_wandb(args)
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        raise ConfigError(
            "--use-distributed-optimizer shards the state of --optimizer adam alone: leave one of them out"
        )
    if args.optimizer == "muon":
        _check_muon(args)
    absent = _check_packages(args)
    if args.attention_backend != AttnBackend.flash:  # otherwise Megatron looks for a package, see above
        check_backend(args.attention_backend)
    # Megatron's configs check combinations when they are built; the model's needs Transformer Engine for it.
    configs = [get_megatron_optimizer_config, get_megatron_ddp_config]
    if "transformer_engine" not in absent:
        configs.append(lambda args: core_transformer_config_from_args(args, NeoConfig))
    for build in configs:
        try:
            build(copy.copy(args))
        except (AssertionError, ValueError) as error:
            if isinstance(error, ConfigError) or not str(error):
                raise
            raise ConfigError(f"these flags do not go together: {' '.join(str(error).split())}") from error


def check_checkpoint(args: Namespace, read_tensors: bool) -> Path | None:
    """The checkpoint that a run starts from, see `choose_checkpoint`. Collective; changes no file.

    Raises:
        ConfigError: no checkpoint is complete, or it is not of this run, or lacks state that the run needs.
    """
    checkpoint = choose_checkpoint(args, read_tensors)
    if checkpoint is None and args.skip_train:
        raise ConfigError(f"--skip-train: --load {args.load} has no checkpoint to evaluate: give another")
    if checkpoint is not None:
        check_model_and_schedule(args, checkpoint)
    check_way(args, checkpoint)
    return checkpoint


def _check_muon(args: Namespace) -> None:
    if not 0 <= args.muon_momentum < 1:
        raise ConfigError(f"--muon-momentum {args.muon_momentum}: give a number from 0 to below 1")
    if args.muon_num_ns_steps < 1:
        raise ConfigError(f"--muon-num-ns-steps {args.muon_num_ns_steps}: give 1 or more")
    if not 0 < args.muon_extra_scale_factor < math.inf:
        raise ConfigError(f"--muon-extra-scale-factor {args.muon_extra_scale_factor}: give a number above 0")


def _check_wandb(args: Namespace) -> None:
    if not args.wandb_project:
        return
    if not args.wandb_exp_name:
        raise ConfigError("--wandb-project needs the name of the run: add --wandb-exp-name")
    if not args.wandb_save_dir and not args.save:
        raise ConfigError("--wandb-project needs a directory for its files: add --wandb-save-dir, or --save")


def _needed(args: Namespace) -> Iterator[tuple[str, str, bool]]:
    """(flag, package, whether only machines with GPUs have the package) for every package that the run needs."""
    if args.wandb_project:
        yield "--wandb-project", "wandb", False
    if args.mlflow_dir:
        yield "--mlflow-dir", "mlflow", False
    if args.optimizer == "muon":
        yield "--optimizer muon", "emerging_optimizers", False
    if args.tensorboard_dir:
        yield "--tensorboard-dir", "tensorboard", False
    if args.transformer_impl == "transformer_engine":
        yield "--transformer-impl transformer_engine", "transformer_engine", True
    if args.attention_backend == AttnBackend.flash:
        yield "--attention-backend flash", "flash_attn", True


def _check_packages(args: Namespace) -> set[str]:
    """Refuses missing packages; a dry run without a GPU reports those that only GPU machines have."""
    absent = set()
    for flag, package, on_gpus in _needed(args):
        if importlib.util.find_spec(package) is not None:
            continue
        absent.add(package)
        remedy = install(package) if package in OPTIONAL else f"pip install {package}"
        if on_gpus and cpu_platform.on_cpu() and args.dry_run:
            print(f"packages     {package} is not installed here; the run needs it for {flag} ({remedy})")
        else:
            raise ConfigError(f"{flag} needs the package {package}, which is not installed: {remedy}, or leave it out")
    return absent
