"""A training: model, data and loss, handed to `megatron.training.pretrain`.

Importing this module prepares torch and Megatron for the machine; `neo_megatron.pretrain_neo` starts a run.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from neo_megatron.megatron_compat import cpu_platform, hooks

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
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from neo_megatron.command_line import sentence_of
from neo_megatron.errors import ConfigError, DataError
from neo_megatron.megatron_compat import steps
from neo_megatron.model.freeze import describe_trainable, freeze_for_stage
from neo_megatron.model.loss import WeightedLoss
from neo_megatron.model.micro_batch import context_share, model_inputs, to_device
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.run.after_loading import after_loading
from neo_megatron.run.attention_tiles import AttentionTiles
from neo_megatron.run.bad_numbers import BadNumbers
from neo_megatron.run.checkpoints import RunCheckpoints
from neo_megatron.run.dry_run import dry_run
from neo_megatron.run.evaluation import evaluate_split
from neo_megatron.run.loader_workers import describe_ended_worker
from neo_megatron.run.loaders import check_loader_memory, datasets_provider
from neo_megatron.run.log_writers import PAIR_RATIO
from neo_megatron.run.module_rates import ModuleRates, group_overrides
from neo_megatron.run.optimizer_state import allocate_moments
from neo_megatron.run.pack_lengths import StepLengths
from neo_megatron.run.progress import progress
from neo_megatron.run.step_log import StepLog
from neo_megatron.run.training_arguments import parse_arguments

# One per process, because with virtual pipeline stages several model chunks share it.
_loss = WeightedLoss()
_bad_numbers = BadNumbers()
_log = StepLog()
_lengths = StepLengths()
_rates = ModuleRates(Namespace(lr_scale="", unfreeze=""))  # of no run


def train() -> None:
    """Trains as the command line says.

    Raises:
        SystemExit: with a sentence, for errors that the user can remedy.
    """
    global _bad_numbers, _rates
    _bad_numbers = BadNumbers()
    hooks.call_after_loading(_after_loading)
    hooks.call_before_saving(_before_saving)
    hooks.call_around_evaluation(evaluate_split)
    hooks.read_skipped_steps()
    hooks.log_with(_log)
    hooks.train_steps_in(_around_step)
    hooks.group_parameters_by(group_overrides, _take_groups)
    steps.patch_steps(_step)
    try:
        args = parse_arguments()
        if args.dry_run:
            dry_run(args)
            return
        progress.watch(args)
        check_loader_memory(args)
        _log.begin(args)
        _rates = ModuleRates(args)
        # Gradients that overflow in float16 are found, and those to be written are written, as they will be used.
        clips = args.clip_grad > 0 and not args.fp16 and args.save_wgrads_interval is None
        steps.begin(clips, _bad_numbers.look_at_norm)
        with RunCheckpoints(args) as run_checkpoints:
            pretrain(
                pretrain_cfg_container_from_args(args),
                datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
                model_provider=partial(model_provider, run_checkpoints=run_checkpoints, tiles=AttentionTiles(args)),
            )
    except (ConfigError, DataError) as error:
        sys.exit(f"pretrain_neo: {error}")
    except SystemExit:
        if _bad_numbers.sentence:
            sys.exit(f"pretrain_neo: {_bad_numbers.sentence}")
        raise
    except (RuntimeError, CheckpointException) as error:
        sentence = describe_ended_worker(error) or sentence_of(error)
        if sentence is None:
            raise
        sys.exit(f"pretrain_neo: {sentence}")
    finally:
        progress.end()
        _log.end()
        if writer := get_tensorboard_writer():
            writer.close()  # Megatron does not, and the last records would be lost


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: NeoConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    *,
    run_checkpoints: RunCheckpoints,
    tiles: AttentionTiles,
) -> NeoModel:
    """Builds this rank's part of the model, frozen for the training stage, and prints what trains."""
    run_checkpoints.start()  # all ranks can communicate here, and Megatron has not loaded yet
    args = get_args()
    config = config or core_transformer_config_from_args(args, NeoConfig)
    config.attention_kernel_options = tiles.options
    # Megatron copies a configuration for experts: a function is shared, the arguments of a `partial` are copied.
    config.finalize_model_grads_func = lambda *given, **groups: finalize_step(run_checkpoints, *given, **groups)
    model = NeoModel(
        config, pre_process=pre_process, post_process=post_process, pg_collection=pg_collection, vp_stage=vp_stage
    )
    freeze_for_stage(model, args.training_stage)
    _rates.mark(model)
    _bad_numbers.watch(model)
    _log.watch(model)
    if _first_of_its_stage():
        stage = parallel_state.get_pipeline_model_parallel_rank()
        print(f"training stage {args.training_stage}, pipeline stage {stage}: {describe_trainable(model)}", flush=True)
    return model


@contextmanager
def _around_step() -> Iterator[None]:
    progress.note(f"step {get_args().curr_iteration + 1}")
    _rates.begin_step()
    with _lengths.step():
        yield
    progress.end_start()


def _after_loading(*loaded: Any) -> None:
    progress.note("the start")
    after_loading(*loaded)
    progress.note("the start")


def _before_saving(optimizer: MegatronOptimizer | None) -> None:
    progress.note("a save")
    allocate_moments(optimizer)


def _take_groups(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    _rates.take(optimizer, scheduler)
    _log.take_rates(_rates.scalars)


def _step(*step: Any) -> Any:
    return _bad_numbers.step(*step)


def _first_of_its_stage() -> bool:
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return data_rank == 0 and parallel_state.get_tensor_model_parallel_rank() == 0


def finalize_step(run_checkpoints: RunCheckpoints, model: list[torch.nn.Module], num_tokens: Tensor, **groups) -> None:
    """Called by Megatron once per step on all ranks: normalises the gradients, and handles finished saves."""
    run_checkpoints.look()
    _bad_numbers.end_of_computation()
    _loss.finalize_model_grads(model, num_tokens, **groups)
    _rates.hold_gradients()


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, partial]:
    """Runs one micro-batch: returns the output and the function that reduces it to a loss on the last stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    args = get_args()
    packs = next(data_iterator)
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    if torch.is_grad_enabled():
        _bad_numbers.note(packs, vp_stage or 0)
        if not (vp_stage or _bad_numbers.again):  # virtual stages read the same packs in turn
            _log.note(packs)
    elif not vp_stage:
        progress.note("an evaluation")
        _log.note_evaluation(packs)
    if args.context_parallel_size > 1:
        packs = context_share(
            packs,
            parallel_state.get_context_parallel_rank(),
            args.context_parallel_size,
            gather_keys=args.cp_comm_type == ["allgather"],
        )
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    inputs = model_inputs(
        packs,
        first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        last_stage=last_stage,
        sequence_rank=parallel_state.get_tensor_model_parallel_rank() if args.sequence_parallel else 0,
        sequence_ranks=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        experts=bool(args.num_experts),
    )
    device = torch.device("cpu" if cpu_platform.on_cpu() else "cuda")
    trained = {name: packs[name] for name in ("target_weight", "target_group")} if last_stage else {}
    inputs, trained = to_device(inputs, device), to_device(trained, device)
    if args.num_experts and torch.is_grad_enabled():
        inputs["loss_weights"] = loss_weights(packs["target_weight"].sum().to(device))
    timers("batch-generator").stop()
    view = packs.get("view", 0)
    return model(**inputs), partial(loss_and_report, model, packs["data_sets"], trained, view)


def loss_weights(weight: Tensor) -> Tensor:
    """`expert_router.Tokens.loss_weights` from the sum of this rank's part of its packs."""
    both = weight.repeat(2)
    groups = parallel_state.get_context_parallel_group(), parallel_state.get_data_parallel_group(True)
    for part, group in zip(both, groups, strict=True):
        torch.distributed.all_reduce(part, group=group)
    return both


def loss_and_report(
    model: torch.nn.Module, data_sets: tuple[str, ...], trained: dict[str, Tensor], view: int, nll_M: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`WeightedLoss` of the micro-batch that has just gone through ``model``, with further figures to log.

    Megatron sums both numbers of an entry over the global batch and logs their quotient.

    Args:
        trained: ``target_weight`` and ``target_group`` of the trained positions, see `PackDataset.__getitem__`.
        view: see `image_views.ViewedBatches`; Megatron logs the loss of the own images alone.
    """
    weight_M = trained["target_weight"]
    loss, count, report = _loss(weight_M, nll_M)
    _log.note_loss(data_sets, trained["target_group"], weight_M, nll_M)
    if torch.is_grad_enabled():
        _bad_numbers.note_loss(loss, weight_M.sum())
    if view:
        return loss, count, {}
    pairs = get_attr_wrapped_model(model, "attention_pairs")
    if pairs is not None:
        report[PAIR_RATIO] = pairs
    return loss, count, report
