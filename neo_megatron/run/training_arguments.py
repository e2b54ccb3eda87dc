"""The command line of a training: Megatron's flags and NEO's, with presets as defaults, checked before a run starts."""

import dataclasses
from argparse import ArgumentParser, Namespace
from typing import NoReturn

from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import has_nvrx_checkpointing_async_support

from neo_megatron import cpu_platform, presets
from neo_megatron.arguments import NeoModelArguments, NeoTrainingArguments, add_neo_arguments
from neo_megatron.data.pack_index import PackIndex
from neo_megatron.model.config import ConfigError
from neo_megatron.model.transformer_config import megatron_arguments, sizes_from_arguments
from neo_megatron.parallel_layout import check_layout, context_parallel_way
from neo_megatron.pipeline_layout import choose_layout
from neo_megatron.planning.packs import measure_packs
from neo_megatron.run.checkpoints import check_save_flags
from neo_megatron.run.console import say
from neo_megatron.run.pretrained_optimizer import check_flags as check_optimizer_flags
from neo_megatron.run.start_checks import check_settings


def parse_arguments() -> Namespace:
    """Megatron's and NEO's arguments; presets are defaults, so that a flag on the command line always wins."""
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--neo-model", default=NeoModelArguments.neo_model)
    early.add_argument("--training-stage", type=int, default=NeoTrainingArguments.training_stage)
    early.add_argument("--lr-warmup-iters")
    early.add_argument("--lr-warmup-samples")
    chosen, _ = early.parse_known_args()
    preset = presets.sizes(chosen.neo_model)

    stage = dict(presets.STAGES.get(chosen.training_stage, {}))
    if chosen.lr_warmup_iters or chosen.lr_warmup_samples:
        del stage["lr_warmup_fraction"]  # Megatron takes one of the three

    def extra_arguments(parser: ArgumentParser) -> ArgumentParser:
        add_neo_arguments(parser)
        parser.error = _refuse_flags
        parser.set_defaults(
            **megatron_arguments(preset),
            **stage,
            **cpu_platform.argument_defaults(),
            # Packs carry pictures of any number and size, so that Megatron's own loaders cannot stack them.
            dataloader_type="external",
            exit_signal_handler=True,
            # The other one is a package of its own.
            async_strategy="nvrx" if has_nvrx_checkpointing_async_support() else "mcore",
            # Another layout can then take over the optimizer's state.
            dist_ckpt_optim_fully_reshardable=True,
            # Chosen by `context_parallel_way`; Megatron's own default is none that NEO's mask has.
            cp_comm_type=None,
            # Megatron has no defaults for these, and fails without them.
            save_interval=1000,
            eval_interval=1000,
            # With NEO's operations, see `step_log`.
            log_throughput=True,
            log_timers_to_tensorboard=True,
        )
        return parser

    args = parse_args(extra_arguments)
    sizes = sizes_from_arguments(args, preset)
    args.neo_sizes = dataclasses.asdict(sizes)
    if args.seq_length is None and args.train_data_path:
        args.seq_length = PackIndex.open(args.train_data_path[0]).sequence_length
    if not args.valid_data_path:
        args.eval_iters = 0  # else Megatron evaluates on nothing after the last step
    packs = None
    if args.train_data_path and args.pipeline_model_parallel_size > 1:
        packs = measure_packs(PackIndex.open(args.train_data_path[0]))
    layout, stages = choose_layout(args, sizes, packs)
    if layout != args.pipeline_model_parallel_layout:
        args.pipeline_model_parallel_layout = layout
        args.num_virtual_stages_per_pipeline_rank = None  # Megatron counts them in the layout, and takes one of the two
    if stages and args.rank == 0:
        say(stages)
    if args.async_save:
        args.use_persistent_ckpt_worker = True  # without it Megatron warns, and saves while training waits
    check_layout(args)
    args.cp_comm_type = [context_parallel_way(args)]
    try:
        validate_args(args)
    except AssertionError as error:
        if not str(error):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
    check_save_flags(args)
    check_optimizer_flags(args)
    check_settings(args)
    if args.dry_run:
        args.tensorboard_dir = args.wandb_project = None  # it leaves no file behind
    set_global_variables(args)
    return args


def _refuse_flags(message: str) -> NoReturn:
    """In place of argparse's own, which prints the names of all 700 flags first."""
    raise ConfigError(f"{message}; --help lists all flags")
