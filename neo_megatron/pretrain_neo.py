"""Trains NEO: model, data and loss, handed to `megatron.training.pretrain`.

    python -m neo_megatron.launch --nproc-per-node 8 -m neo_megatron.pretrain_neo --neo-model neo-2b \
        --training-stage 1 --train-data-path PACKS ...

Every flag of Megatron's `pretrain_gpt.py` works here; `arguments.py` has the few that NEO adds. `launch` takes the
flags of torchrun, which works too.
"""

if __name__ == "__main__":  # before the imports below, which take seconds; it imports this file under its own name
    import sys

    from neo_megatron.run.start import start

    sys.exit(start())

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from neo_megatron import cpu_platform

cpu_platform.install_training()

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_tensorboard_writer, get_timers, pretrain
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import has_nvrx_checkpointing_async_support
from torch import Tensor
from torch.utils.data import DataLoader

from neo_megatron import presets
from neo_megatron.arguments import NeoModelArguments, NeoTrainingArguments, add_neo_arguments
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.broken import watch_broken_samples
from neo_megatron.data.dataset import GlobalBatch, PackDataset, Pictures, collate
from neo_megatron.data.errors import DataError
from neo_megatron.data.pack_index import PackIndex
from neo_megatron.model.config import ConfigError
from neo_megatron.model.freeze import describe_trainable, freeze_for_stage
from neo_megatron.model.loss import WeightedLoss
from neo_megatron.model.micro_batch import context_share, model_inputs, to_device
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig, megatron_arguments, sizes_from_arguments
from neo_megatron.parallel_layout import check_layout, context_parallel_way
from neo_megatron.pipeline_layout import choose_layout
from neo_megatron.planning.packs import measure_packs
from neo_megatron.run.checkpoints import RunCheckpoints, check_save_flags
from neo_megatron.run.console import say
from neo_megatron.run.dry_run import dry_run
from neo_megatron.run.loader_signals import heed_only_parent
from neo_megatron.run.pretrained_optimizer import check_flags as check_optimizer_flags
from neo_megatron.run.pretrained_optimizer import take_over_state

# One per process: with virtual pipeline stages several model chunks share it.
_loss = WeightedLoss()


def after_loading(
    model: list[torch.nn.Module], optimizer: MegatronOptimizer | None, scheduler: OptimizerParamScheduler | None
) -> None:
    """Takes over an optimizer's state that Megatron does not load: of another kind of optimizer, or of another run."""
    args = get_args()
    if optimizer is None:
        return
    if args.take_optimizer_from:
        _say_on_rank_0(take_over_state(optimizer, model, args.take_optimizer_from))
        scheduler.load_state_dict(TorchDistDirectory(args.take_optimizer_from).common_state()["opt_param_scheduler"])
        args.no_load_optim = False  # was set to keep Megatron from trying
    elif args.pretrained_optimizer and not checkpoint_exists(args.load):
        step = f"iter_{args.ckpt_step:07d}" if args.ckpt_step else ""
        _say_on_rank_0(take_over_state(optimizer, model, Path(args.pretrained_checkpoint) / step))


cpu_platform.call_after_loading(after_loading)


def main() -> None:
    try:
        args = parse_arguments()
        if args.dry_run:
            dry_run(args, open_packs)
            return
        with RunCheckpoints(args) as run_checkpoints:
            pretrain(
                pretrain_cfg_container_from_args(args),
                datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
                model_provider=partial(model_provider, run_checkpoints=run_checkpoints),
            )
    except (ConfigError, DataError) as error:
        sys.exit(f"pretrain_neo: {error}")
    finally:
        if writer := get_tensorboard_writer():
            writer.close()  # Megatron does not, and what was logged last would be lost


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
    if args.dry_run:
        args.tensorboard_dir = args.wandb_project = None  # it leaves no file behind
    set_global_variables(args)
    return args


def _say_on_rank_0(sentence: str) -> None:
    if get_args().rank == 0:
        say(sentence)


def _refuse_flags(message: str) -> NoReturn:
    """In place of argparse's own, which prints the names of all 700 flags first."""
    raise ConfigError(f"{message}; --help lists all flags")


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: NeoConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    *,
    run_checkpoints: RunCheckpoints,
) -> NeoModel:
    """Builds this rank's part of the model, frozen as the training stage asks, and lists what trains."""
    run_checkpoints.start()  # here all ranks can talk to each other, and Megatron has not loaded yet
    args = get_args()
    config = config or core_transformer_config_from_args(args, NeoConfig)
    config.finalize_model_grads_func = partial(finalize_step, run_checkpoints)
    model = NeoModel(
        config, pre_process=pre_process, post_process=post_process, pg_collection=pg_collection, vp_stage=vp_stage
    )
    freeze_for_stage(model, args.training_stage)
    if _first_of_its_stage():
        stage = parallel_state.get_pipeline_model_parallel_rank()
        print(f"training stage {args.training_stage}, pipeline stage {stage}: {describe_trainable(model)}", flush=True)
    return model


def _first_of_its_stage() -> bool:
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return data_rank == 0 and parallel_state.get_tensor_model_parallel_rank() == 0


def finalize_step(run_checkpoints: RunCheckpoints, model: list[torch.nn.Module], num_tokens: Tensor, **groups) -> None:
    """What Megatron calls once in every step on all ranks: normalises the gradients, and sees to finished saves."""
    run_checkpoints.look()
    _loss.finalize_model_grads(model, num_tokens, **groups)


def datasets_provider(
    num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> tuple[Iterator | None, Iterator | None, Iterator | None]:
    """Iterators over micro-batches of packs, for training, validation and test.

    Every rank reads for itself what it needs of a pack, so nothing is broadcast. Where training stands is one number,
    Megatron's count of consumed samples.
    """
    args = get_args()
    pictures: Pictures = "none"
    if parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage):
        pictures = "patches"
    elif parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage):
        pictures = "check"
    train, valid, test = num_samples
    if 0 < train <= args.consumed_train_samples:
        _say_on_rank_0(f"training has ended before: all of its {train} packs were read; a longer one needs more steps")
        sys.exit()
    even = GlobalBatch(
        args.global_batch_size,
        parallel_state.get_data_parallel_world_size(),
        args.micro_batch_size,
        start=args.consumed_train_samples,
    )
    if args.rampup_batch_size:
        even = None  # steps have many sizes
    eval_size = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
    return (
        pack_iterator("train", train, args.consumed_train_samples, args.micro_batch_size, pictures, even),
        pack_iterator("valid", valid, args.consumed_valid_samples, eval_size, pictures),
        pack_iterator("test", test, 0, eval_size, pictures),
    )


datasets_provider.is_distributed = True


def pack_iterator(
    split: str,
    num_samples: int,
    consumed: int,
    micro_batch_size: int,
    pictures: Pictures,
    global_batch: GlobalBatch | None = None,
) -> Iterator[dict[str, Any]] | None:
    """Micro-batches of this data-parallel rank from pack number `consumed` on; `None` where the split has no packs."""
    args = get_args()
    dataset = open_packs(args, split, num_samples, pictures, global_batch)
    if dataset is None:
        return None
    sampler = MegatronPretrainingSampler(
        total_samples=num_samples,
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.num_workers,
        pin_memory=not cpu_platform.on_cpu(),
        persistent_workers=args.num_workers > 0,
        worker_init_fn=partial(heed_only_parent, args.exit_signal),
    )
    # Pipeline stages, tensor- and context-parallel ranks read the same packs; one of them names what is broken.
    ranks_alike = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
    report = pictures == "patches" and ranks_alike == (0, 0)
    return watch_broken_samples(iter(loader), args.max_broken_samples, report)


def open_packs(
    args: Namespace, split: str, num_samples: int, pictures: Pictures, global_batch: GlobalBatch | None = None
) -> PackDataset | None:
    """The packs of a split; `None` where it has none.

    Raises:
        ConfigError: they do not fit the model or the sequence length.
    """
    flag, paths = f"--{split}-data-path", getattr(args, f"{split}_data_path")
    if not paths or num_samples == 0:
        return None
    if len(paths) != 1:
        raise ConfigError(
            f"{flag} takes one directory of packs, not {len(paths)}: "
            "pack data sets together with tools/pack_data.py --data A B"
        )
    quality = args.min_jpeg_quality if split == "train" else 100
    dataset = PackDataset(paths[0], num_samples, args.seed, args.loss_weighting, pictures, global_batch, quality)
    if dataset.packs.sequence_length != args.seq_length:
        raise ConfigError(
            f"{flag} {paths[0]} holds packs of {dataset.packs.sequence_length} tokens, "
            f"--seq-length is {args.seq_length}: pack again with tools/pack_data.py, which does not tokenize again"
        )
    tokens = dataset.packs.data.tokenizer["size"]
    if tokens > args.vocab_size:
        raise ConfigError(
            f"{flag} {paths[0]} was made with a tokenizer of {tokens} tokens, the model has {args.vocab_size}: "
            "grow the model with convert_checkpoint.py qwen3-to-neo --tokenizer, or preprocess with its own tokenizer"
        )
    return dataset


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, partial]:
    """One micro-batch: the model's output, and the function that reduces it to a loss on the last pipeline stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    args = get_args()
    packs = next(data_iterator)
    if args.context_parallel_size > 1:
        packs = context_share(
            packs,
            parallel_state.get_context_parallel_rank(),
            args.context_parallel_size,
            gather_keys=args.cp_comm_type == ["allgather"],
        )
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    inputs = model_inputs(
        packs,
        first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        last_stage=last_stage,
        sequence_rank=parallel_state.get_tensor_model_parallel_rank() if args.sequence_parallel else 0,
        sequence_ranks=args.tensor_model_parallel_size if args.sequence_parallel else 1,
    )
    device = torch.device("cpu" if cpu_platform.on_cpu() else "cuda")
    weights = {"target_weight": packs["target_weight"]} if last_stage else {}
    inputs, weights = to_device(inputs, device), to_device(weights, device)
    timers("batch-generator").stop()
    return model(**inputs), partial(loss_and_report, model, weights.get("target_weight"))


def loss_and_report(
    model: torch.nn.Module, weight_M: Tensor, nll_M: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What `WeightedLoss` gives for the micro-batch that has just gone through ``model``, and more to log.

    Megatron sums up both numbers of an entry over the global batch, divides them, and reads the result when it logs.
    """
    loss, count, report = _loss(weight_M, nll_M)
    pairs = get_attr_wrapped_model(model, "attention_pairs")
    if pairs is not None:
        report["attention pairs computed per allowed"] = pairs
    return loss, count, report
