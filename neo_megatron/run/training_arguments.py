"""The command line of a training: Megatron's flags and NEO's, with presets as defaults, checked before a run starts."""

import dataclasses
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import has_nvrx_checkpointing_async_support

from neo_megatron import presets
from neo_megatron.arguments import NeoKernelArguments, NeoTrainingArguments, add_neo_arguments
from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.errors import ConfigError
from neo_megatron.megatron_compat import cpu_platform, fsdp
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.transformer_config import NeoConfig, megatron_arguments, sizes_from_arguments
from neo_megatron.planning.packs import measure_packs
from neo_megatron.planning.pipeline_split import choose_layout
from neo_megatron.run import bad_loss_rule
from neo_megatron.run.bad_numbers import check_rerun_flags
from neo_megatron.run.checkpoints import check_save_flags
from neo_megatron.run.console import say
from neo_megatron.run.evaluation import check_evaluation_flags
from neo_megatron.run.flag_table import given_flags, gpu_refusals, refusals, without_effect
from neo_megatron.run.help_text import prepare_help
from neo_megatron.run.learning_rate import WARMUP_FLAGS, fill_schedule, schedule_refusals
from neo_megatron.run.module_rates import rate_refusals
from neo_megatron.run.pack_lengths import check_layouts_of_lengths, take_lengths
from neo_megatron.run.pretrained_optimizer import check_flags as check_optimizer_flags
from neo_megatron.run.start_checks import check_settings
from neo_megatron.validation.parallelism import context_parallel_way


def parse_arguments() -> Namespace:
    """Megatron's and NEO's arguments; presets are defaults, so that a flag on the command line always wins."""
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.error = _refuse_flags
    early.add_argument("--neo-model")
    early.add_argument("--training-stage", type=int)
    early.add_argument("--recipe")
    for flag in WARMUP_FLAGS:
        early.add_argument(flag)
    chosen, _ = early.parse_known_args()
    asks_for_help = bool({"-h", "--help"} & set(sys.argv[1:]))
    if not (chosen.neo_model or asks_for_help):
        raise ConfigError(f"--neo-model is missing: give {', '.join(presets.SIZES)}, or a directory or hub id of a NEO")
    preset = sizes_of(chosen.neo_model or "tiny")

    stage_number = NeoTrainingArguments.training_stage if chosen.training_stage is None else chosen.training_stage
    recipe = chosen.recipe or presets.RECIPE_OF_SIZE.get(chosen.neo_model, presets.DEFAULT_RECIPE)
    stage = presets.RECIPES[recipe].stages.get(stage_number, {}) if recipe in presets.RECIPES else {}
    filled_later = {"min_lr": None, "lr_warmup_iters": 0}  # see `fill_schedule`
    warmup_given = any((chosen.lr_warmup_fraction, chosen.lr_warmup_iters, chosen.lr_warmup_samples))
    given: dict[str, Any] = {}

    def extra_arguments(parser: ArgumentParser) -> ArgumentParser:
        add_neo_arguments(parser)
        parser.error = _refuse_flags
        parser.set_defaults(**run_defaults(preset), **{**stage, **filled_later}, recipe=recipe)
        if chosen.lr_warmup_iters or chosen.lr_warmup_samples:
            parser.set_defaults(lr_warmup_fraction=None)  # Megatron accepts one of the three
        if asks_for_help:
            prepare_help(parser)
        parsed = parser.parse_args()  # Megatron parses again and acts on some flags at once
        given.update(given_flags(parser, parsed, sys.argv[1:]))
        _raise_first(refusals(given, parsed))
        return parser

    args = parse_args(extra_arguments)
    if not cpu_platform.on_cpu():
        choose_gpu(args, torch.cuda.device_count())
    # Their only use; a full mesh of connections between data-parallel ranks.
    args.use_gloo_process_groups = args.distrib_optim_fully_reshardable_mem_efficient
    if chosen.recipe and chosen.training_stage is None:
        raise ConfigError(
            f"--recipe {recipe} has other numbers for each training stage: add --training-stage 1, 2 or 3"
        )
    _raise_first(fill_schedule(args, stage, warmup_given))
    _raise_first(schedule_refusals(args))
    sizes = sizes_from_arguments(args, preset)
    args.neo_sizes = dataclasses.asdict(sizes)
    _raise_first(rate_refusals(args, sizes))
    take_mixture(args)
    take_lengths(args)
    check_evaluation_flags(args)
    check_rerun_flags(args)
    _raise_first(bad_loss_rule.rule_refusals(args))
    vars(args).update(bad_loss_rule.state_of(None))
    packs = None
    # A given split is only described, by rank 0.
    described = args.rank == 0 or not args.pipeline_model_parallel_layout
    if args.train_data_path and args.pipeline_model_parallel_size > 1 and described:
        packs = measure_packs(args.train_data_path[0])
    layout, stages = choose_layout(args, sizes, packs)
    if layout != args.pipeline_model_parallel_layout:
        args.pipeline_model_parallel_layout = layout
        args.num_virtual_stages_per_pipeline_rank = None  # the layout implies it, and Megatron accepts one of the two
    if stages and args.rank == 0:
        say(stages)
    if args.async_save:
        args.use_persistent_ckpt_worker = True  # without it Megatron warns, and saves while training waits
        if args.async_strategy == "nvrx" and not has_nvrx_checkpointing_async_support():
            raise ConfigError(
                "--async-strategy nvrx needs the package nvidia-resiliency-ext: install it, or choose mcore"
            )
    if args.rank == 0:
        say(f"training stage {args.training_stage}, --recipe {recipe}: {presets.RECIPES[recipe].source}; flags win")
    if args.use_megatron_fsdp:
        fsdp.complete(args)
    check_layouts_of_lengths(args)
    own_tiles = {AttnBackend.flash, AttnBackend.unfused}
    if args.attention_tiles != NeoKernelArguments.attention_tiles and args.attention_backend in own_tiles:
        backend = args.attention_backend.name
        raise ConfigError(
            f"--attention-tiles is for FlexAttention, not for --attention-backend {backend}: leave one out"
        )
    if cpu_platform.on_cpu() and not args.dry_run:
        _raise_first(gpu_refusals(given))
        if args.attention_tiles != NeoKernelArguments.attention_tiles:
            raise ConfigError("--attention-tiles chooses a kernel of a GPU, and this machine has none: leave it out")
    if args.rank == 0 and (idle := without_effect(given)):
        say(idle)
    args.cp_comm_type = [context_parallel_way(args)]
    try:
        with fsdp.saved_as_torch_dist(args):
            validate_args(args)
        complete_last_step(args)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(_sentence(error)) from error
    check_save_flags(args)
    check_optimizer_flags(args)
    check_settings(args)
    if args.dry_run:
        args.tensorboard_dir = args.wandb_project = args.mlflow_dir = None  # a dry run leaves no file
    _set_global_variables(args)
    return args


def run_defaults(sizes: NeoSizes) -> dict[str, Any]:
    """Defaults of Megatron's arguments that a training of NEO changes, in addition to those of its stage."""
    return {
        **megatron_arguments(sizes),
        **cpu_platform.argument_defaults(),
        # Packs carry images of any number and size, so that Megatron's own loaders cannot stack them.
        "dataloader_type": "external",
        "exit_signal_handler": True,
        # The other strategy needs a package of its own.
        "async_strategy": "nvrx" if has_nvrx_checkpointing_async_support() else "mcore",
        # Optimizer state can then be loaded on another parallel layout.
        "dist_ckpt_optim_fully_reshardable": True,
        # Otherwise every data-parallel rank reads all of it.
        "ckpt_fully_parallel_load": True,
        # Megatron's own default orthogonalizes the part of a matrix that a tensor-parallel rank holds.
        "muon_tp_mode": "duplicated",
        # As without FSDP; Megatron would sum gradients in the precision of the weights.
        "megatron_fsdp_main_grads_dtype": "fp32",
        # Rounds to FP8 once all of a parameter is there, and not each stored piece with a scale of its own.
        "stream_ckpt_dequant": False,
        # As in `NeoConfig`.
        "fp8_amax_history_len": NeoConfig.fp8_amax_history_len,
        "fp8_amax_compute_algo": NeoConfig.fp8_amax_compute_algo,
        # Chosen by `context_parallel_way`; Megatron's own default does not support NEO's mask.
        "cp_comm_type": None,
        # Megatron has no defaults for these, and fails without them.
        "save_interval": 1000,
        "eval_interval": 1000,
        # With NEO's operations, see `step_log`.
        "log_throughput": True,
        "log_timers_to_tensorboard": True,
    }


def choose_gpu(args: Namespace, gpus: int) -> None:
    """Sets ``args.local_rank`` to the GPU of this process, one of those that it sees.

    Raises:
        ConfigError: it sees several, but too few for the processes of this machine.
    """
    if gpus == 1:  # the scheduler shows every task a GPU of its own
        args.local_rank = 0
    elif args.local_rank >= gpus:
        raise ConfigError(
            f"LOCAL_RANK={args.local_rank}, but this process sees {gpus} GPUs: start as many processes on a machine, "
            "or show each a GPU of its own"
        )


def complete_last_step(args: Namespace) -> None:
    """Raises ``args.train_samples`` to the end of a step if ``--step-batch-size-schedule`` sets the batch sizes.

    Megatron also runs a step for the last samples, and reads a full batch for it.

    Raises:
        ValueError, AssertionError: the schedule cannot be read, or a batch does not divide.
    """
    if not args.step_batch_size_schedule or args.skip_train:
        return
    sizes = StepBatchsizeNumMicroBatchesCalculator(
        args.micro_batch_size, args.data_parallel_size, False, args.rank, args.step_batch_size_schedule, args.seq_length
    )
    samples = 0
    while samples < args.train_samples:
        sizes.update(samples, consistency_check=True)
        samples += sizes.get_current_global_batch_size()
    args.train_samples = samples


def take_mixture(args: Namespace) -> None:
    """Makes the schedule of a mixture what the run trains on. Raises ConfigError if packs are given as well."""
    if args.mixture and args.train_data_path:
        raise ConfigError(
            "--mixture and --train-data-path both say what to train on: name the directories of packs in the schedule"
        )
    if args.mixture:
        args.train_data_path = [args.mixture]


def _set_global_variables(args: Namespace) -> None:
    """Megatron's, with its writers. Raises ConfigError if Weights & Biases refuses the run."""
    if not args.wandb_project:
        set_global_variables(args)
        return
    import wandb

    try:
        set_global_variables(args)
    except wandb.errors.Error as error:
        raise ConfigError(f"--wandb-project: {error} Or set WANDB_MODE=offline and upload later.") from error


def _raise_first(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        raise ConfigError(sentence)


def _sentence(error: Exception) -> str:
    """The message of Megatron's checks, or the failed condition if they give none."""
    if text := " ".join(str(error).split()):
        return text
    asked = traceback.extract_tb(error.__traceback__)[-1].line.removeprefix("assert ")
    return f"Megatron does not take these flags together: it asks for `{asked}`"


def _refuse_flags(message: str) -> NoReturn:
    """Replaces argparse's own error, which prints the names of all 700 flags first."""
    raise ConfigError(f"{message}; --help lists all flags")
