"""Rejects parallel layouts that cannot work, before anything is built: one sentence that names the flags and a remedy.

Megatron stops many of them with an assertion during its start, some after minutes, and trains wrongly with one.
Reads Megatron's arguments as parsed, without a process group, so that a dry run can check any layout.
"""

from argparse import Namespace
from collections.abc import Iterator
from itertools import chain

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from neo_megatron.errors import ConfigError
from neo_megatron.model.context_parallel_cost import WAYS, default_way
from neo_megatron.model.transformer_config import tensor_parallel_refusals
from neo_megatron.validation.fp8 import check_fp8
from neo_megatron.validation.fully_sharded import fully_sharded_refusals
from neo_megatron.validation.recomputation import recomputation_refusals


def check_layout(args: Namespace) -> None:
    """Raises ConfigError with the first reason why `args` cannot train; `args.world_size` is the number of ranks."""
    for sentence in chain.from_iterable(check(args) for check in CHECKS):
        raise ConfigError(sentence)


def context_parallel_way(args: Namespace) -> str:
    """``--cp-comm-type``, or without it the way with fewer bytes on the wire."""
    if args.cp_comm_type:
        return args.cp_comm_type[0]
    tensor_parallel = args.tensor_model_parallel_size
    return default_way(
        args.num_attention_heads // tensor_parallel,
        args.num_query_groups // tensor_parallel,
        args.context_parallel_size,
    )


def _ranks(args: Namespace) -> Iterator[str]:
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--context-parallel-size": args.context_parallel_size,
    }
    for flag, size in sizes.items():
        if size < 1:
            yield f"{flag} {size}: a parallel size is at least 1"
    if args.world_size % _model_ranks(args):
        chosen = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
        yield (
            f"{chosen} needs a multiple of {_model_ranks(args)} processes, not {args.world_size}: "
            "start as many, or make the sizes smaller"
        )


def _tensor_parallel(args: Namespace) -> Iterator[str]:
    size = args.tensor_model_parallel_size
    counts = {
        "query heads": args.num_attention_heads,
        "key-value heads": args.num_query_groups,
        "vocabulary rows": args.vocab_size,
        "channels of --ffn-hidden-size": args.ffn_hidden_size,
    }
    yield from tensor_parallel_refusals(size, counts)
    if args.sequence_parallel and size == 1:
        yield "--sequence-parallel shares a sequence out to tensor-parallel ranks: add --tensor-model-parallel-size 2"
    if args.tp_comm_overlap and not args.sequence_parallel:
        yield "--tp-comm-overlap works on parts of a sequence: add --sequence-parallel"


def _experts(args: Namespace) -> Iterator[str]:
    if args.balance_loss_coeff < 0 or (args.balance_loss_coeff and not args.num_experts):
        yield "--balance-loss-coeff is 0 or more, and for a --neo-model with experts: leave it out"
    yield from recomputation_refusals(
        args.recompute_modules or (),
        bool(args.num_experts),
        args.context_parallel_size,
        args.fp8_recipe if args.fp8 else None,
    )
    if not args.num_experts:
        return
    size, tensor = args.expert_model_parallel_size, args.tensor_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or tensor
    if size < 1 or args.num_experts % size:
        yield f"--expert-model-parallel-size {size} does not divide the {args.num_experts} experts: choose another size"
    elif args.world_size % (size * expert_tensor * args.pipeline_model_parallel_size):
        yield (
            f"--expert-model-parallel-size {size} with {expert_tensor} tensor-parallel ranks of an expert does not "
            f"divide the {args.world_size // args.pipeline_model_parallel_size} ranks of a pipeline stage: choose a "
            "smaller size, or --expert-tensor-parallel-size 1"
        )
    if expert_tensor < 1 or args.moe_ffn_hidden_size % expert_tensor:
        yield (
            f"--expert-tensor-parallel-size {expert_tensor} does not divide the {args.moe_ffn_hidden_size} channels of "
            "an expert: choose a size that does, such as 1"
        )
    if tensor > 1 and not args.sequence_parallel:
        yield "a mixture of experts with --tensor-model-parallel-size needs --sequence-parallel: add it"
    if args.balance_loss_coeff and "moe" in (args.recompute_modules or ()):
        yield (
            "--recompute-modules moe does not go with --balance-loss-coeff, whose figures would be those of another "
            "micro-batch: recompute other modules, or --recompute-granularity full"
        )


def _sequence(args: Namespace) -> Iterator[str]:
    length = args.seq_length
    if length is None:
        yield "--train-data-path is missing: a directory of packs, written by neo-megatron pack"
        return
    if length > args.max_position_embeddings:
        yield (
            f"--seq-length {length} is more than --max-position-embeddings {args.max_position_embeddings}: "
            "raise that, or pack shorter"
        )
    context, tensor = args.context_parallel_size, args.tensor_model_parallel_size
    # Megatron requires 2 parts per rank, which its causal kernels need.
    parts = 2 * context if context > 1 else 1
    if length % parts:
        yield (
            f"--context-parallel-size {context} needs a --seq-length that is a multiple of {parts}, not {length}: "
            "pack again with neo-megatron pack --seq-length, or choose another size"
        )
    if args.sequence_parallel and length % (tensor * context):
        yield (
            f"--sequence-parallel with --tensor-model-parallel-size {tensor} and --context-parallel-size {context} "
            f"needs a --seq-length that is a multiple of {tensor * context}, not {length}: pack again with "
            "neo-megatron pack --seq-length, or choose other sizes"
        )


def _context_parallel(args: Namespace) -> Iterator[str]:
    size = args.context_parallel_size
    if args.hybrid_context_parallel or args.hierarchical_context_parallel_sizes:
        flag = "--hybrid-context-parallel" if args.hybrid_context_parallel else "--hierarchical-context-parallel-sizes"
        yield f"{flag} is not for NEO's mask: leave it out; --cp-comm-type is {' or '.join(WAYS)}"
    if not args.cp_comm_type:
        return
    if len(args.cp_comm_type) > 1 or args.cp_comm_type[0] not in WAYS:
        yield (
            f"--cp-comm-type {' '.join(args.cp_comm_type)}: NEO's mask has one way for all layers, "
            f"{' or '.join(WAYS)}; without the flag the one with fewer bytes on the wire is taken"
        )
    heads = args.num_query_groups // args.tensor_model_parallel_size
    if args.cp_comm_type == ["a2a"] and heads % size:
        yield (
            f"--cp-comm-type a2a with --context-parallel-size {size}: a tensor-parallel rank's {heads} key-value heads "
            "cannot be divided evenly; choose --cp-comm-type allgather, or a smaller size"
        )


def _pipeline(args: Namespace) -> Iterator[str]:
    stages, layers = args.pipeline_model_parallel_size, args.num_layers
    per_chunk, chunks = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    layout = args.pipeline_model_parallel_layout
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    ways = {
        "--num-layers-per-virtual-pipeline-stage": per_chunk,
        "--num-virtual-stages-per-pipeline-rank": chunks,
        "--pipeline-model-parallel-layout": layout,
    }
    given = [flag for flag, value in ways.items() if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} say the same thing in two ways: give one"
    if layout is not None:
        chunks = PipelineParallelLayerLayout.get_num_stages_from_str(layout) // stages
    elif first is not None or last is not None:
        if per_chunk is not None:
            yield (
                "--num-layers-per-virtual-pipeline-stage wants alike stages; with --decoder-first-pipeline-num-layers "
                "or --decoder-last-pipeline-num-layers use --num-virtual-stages-per-pipeline-rank"
            )
        middle, stages_between = layers - (first or 0) - (last or 0), stages - (first is not None) - (last is not None)
        if stages_between < 0 or bool(middle) != bool(stages_between) or (stages_between and middle % stages_between):
            yield (
                f"--decoder-first-pipeline-num-layers {first or 0} and --decoder-last-pipeline-num-layers {last or 0} "
                f"leave {middle} layers to the {stages_between} pipeline stages between them: leave a multiple"
            )
        yield from _chunks_divide([first, last, middle // stages_between if stages_between else None], chunks)
    else:
        counted = layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        if counted % stages:
            yield (
                f"--pipeline-model-parallel-size {stages} does not divide the {counted} layers: choose a size that "
                "does, or say where stages begin with --pre-buffer-pipeline-stages or --pipeline-model-parallel-layout"
            )
        if per_chunk is not None:
            if per_chunk < 1 or counted // stages % per_chunk:
                yield (
                    f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {counted // stages} "
                    "layers of a pipeline stage: choose a number that does"
                )
            chunks = counted // stages // per_chunk
        yield from _chunks_divide([counted // stages], chunks)
    if chunks is not None and chunks > 1:
        yield from _interleaving(args, stages)


def _chunks_divide(layers_of_stages: list[int | None], chunks: int | None) -> Iterator[str]:
    uneven = [count for count in layers_of_stages if count is not None and chunks and count % chunks]
    if uneven or (chunks is not None and chunks < 1):
        yield (
            f"--num-virtual-stages-per-pipeline-rank {chunks} does not divide the {(uneven or layers_of_stages)[0]} "
            "layers of a pipeline stage: choose a number that does, or --pipeline-model-parallel-layout"
        )


def _interleaving(args: Namespace, stages: int) -> Iterator[str]:
    if stages == 1:
        yield "virtual pipeline stages need a pipeline: add --pipeline-model-parallel-size 2, or leave them out"
    if not args.overlap_p2p_comm:
        yield (
            "virtual pipeline stages with --no-overlap-p2p-communication train wrongly: leave that flag out, "
            "or the virtual stages"
        )
    at_once = args.microbatch_group_size_per_vp_stage or stages
    micro_batches = _micro_batches(args)
    if at_once < stages or micro_batches < at_once or 0 < micro_batches % at_once < stages:
        yield (
            f"virtual pipeline stages work through {at_once} micro-batches at once, in turn on {stages} stages; "
            f"--global-batch-size {_global_batch(args)} makes {micro_batches}: choose one that makes a multiple of "
            f"{stages}"
        )


def _batch(args: Namespace) -> Iterator[str]:
    if args.micro_batch_size is None or args.micro_batch_size < 1:
        yield "--micro-batch-size is missing: packs that a rank reads at once, usually 1"
        return
    ranks = _data_parallel(args)
    if args.step_batch_size_schedule is None:
        yield from _divides("", _global_batch(args), args.micro_batch_size, ranks)
    eval_micro_batch = args.eval_micro_batch_size or args.micro_batch_size
    yield from _divides("eval-", args.eval_global_batch_size or _global_batch(args), eval_micro_batch, ranks)


def _divides(prefix: str, global_batch: int, micro_batch: int, ranks: int) -> Iterator[str]:
    if global_batch < 1 or global_batch % (micro_batch * ranks):
        yield (
            f"--{prefix}global-batch-size {global_batch} is not a multiple of --{prefix}micro-batch-size {micro_batch} "
            f"times the {ranks} data-parallel ranks: choose a multiple of {micro_batch * ranks}"
        )


def _optimizer(args: Namespace) -> Iterator[str]:
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: add them"


def _fully_sharded(args: Namespace) -> Iterator[str]:
    if args.use_megatron_fsdp:
        yield from fully_sharded_refusals(
            args.data_parallel_sharding_strategy,
            args.pipeline_model_parallel_size,
            args.tensor_model_parallel_size,
            bool(args.num_experts),
            bool(args.fp8),
            args.fp16,
            args.optimizer == "sgd",
        )


def _recomputation(args: Namespace) -> Iterator[str]:
    granularity = "selective" if args.recompute_activations else args.recompute_granularity
    if granularity == "full" and not (args.recompute_method and args.recompute_num_layers):
        yield (
            "--recompute-granularity full needs to know which layers: "
            "add --recompute-method uniform --recompute-num-layers 1"
        )
    if granularity == "selective" and (args.recompute_method or args.recompute_num_layers):
        yield (
            "--recompute-granularity selective recomputes parts of every layer: leave out --recompute-method and "
            "--recompute-num-layers"
        )
    if args.distribute_saved_activations and (args.tensor_model_parallel_size == 1 or granularity != "full"):
        yield (
            "--distribute-saved-activations needs --tensor-model-parallel-size of 2 or more and "
            "--recompute-granularity full: add them, or leave it out"
        )


def _model_ranks(args: Namespace) -> int:
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def _data_parallel(args: Namespace) -> int:
    return args.world_size // _model_ranks(args)


def _global_batch(args: Namespace) -> int:
    return args.micro_batch_size * _data_parallel(args) if args.global_batch_size is None else args.global_batch_size


def _micro_batches(args: Namespace) -> int:
    return _global_batch(args) // (args.micro_batch_size * _data_parallel(args))


CHECKS = (
    _ranks,
    _tensor_parallel,
    _experts,
    _sequence,
    _context_parallel,
    _batch,
    _pipeline,
    _optimizer,
    _fully_sharded,
    _recomputation,
    check_fp8,
)
