r"""Plans a run without a GPU: memory, traffic and time of every rank, and whether it fits; or ranks parallel layouts.

    neo-megatron plan --neo-model neo-9b --training-stage 2 --seq-length 18432 --gpus 64 \
        --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer
    neo-megatron plan --neo-model neo-9b --training-stage 2 --seq-length 18432 --search --gpus 256

Flags of the parallel layout and of recomputation are Megatron's. --search keeps those that are given and tries all
values of the others.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.cli.renamed_flags import add_old_name
from neo_megatron.errors import ConfigError
from neo_megatron.model.config import ELEMENTWISE, NeoSizes
from neo_megatron.planning.hardware import GPUS, Efficiency, Gpu
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.pipeline_split import UNEVEN_SPLIT_FLAGS, choose_layout
from neo_megatron.planning.report import Plan, describe
from neo_megatron.planning.search import describe_search, distinct, flags, search
from neo_megatron.planning.workload import Workload

# Defaults of the parallel layout; a search tries all values.
LAYOUT = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "pre_buffer_pipeline_stages": 0,
    "context_parallel_size": 1,
    "cp_comm_type": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "micro_batch_size": 1,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "optimizer": "adam",
    "use_megatron_fsdp": False,
    "data_parallel_sharding_strategy": "optim_grads_params",
    "fp8_param_gather": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": 1,
    "recompute_modules": ["core_attn"],
    "transformer_impl": "transformer_engine",
    "attention_backend": "auto",
}


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; an invalid one raises ConfigError, as in training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = refuse
    run = parser.add_argument_group("run")
    run.add_argument(
        "--neo-model",
        required=True,
        metavar="SIZE",
        help="neo-2b, neo-9b, u1-8b, u1-a3b, tiny, or a directory or hub id of a NEO",
    )
    run.add_argument(
        "--training-stage", type=int, default=2, choices=(1, 2, 3), help="training stage; default: %(default)s"
    )
    run.add_argument(
        "--seq-length", type=count, metavar="N", help="tokens of a pack; default: as in --packs, else 16384"
    )
    run.add_argument(
        "--global-batch-size", type=count, metavar="N", default=256, help="packs of a step; default: %(default)s"
    )
    run.add_argument(
        "--precision", choices=("bf16", "fp8", "fp32"), default="bf16", help="of the products; default: %(default)s"
    )
    run.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="transformer_engine: the kernels of a GPU; local: those of a CPU; default: transformer_engine",
    )
    run.add_argument(
        "--attention-backend",
        choices=("auto", "flash"),
        help="auto: FlexAttention; flash: FlashAttention 4, h100 and h200 only; default: auto",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=count, metavar="N", default=8, help="number of GPUs; default: %(default)s")
    machine.add_argument("--gpu", choices=GPUS, default="h100", help="kind of GPU; default: %(default)s")
    machine.add_argument(
        "--gpu-memory", type=gigabytes, metavar="GB", help="memory of a GPU in GB of 10^9 bytes; default: that of --gpu"
    )
    machine.add_argument(
        "--reserve",
        type=gigabytes,
        metavar="GB",
        default=5.0,
        help="GB of it that the plan leaves free; default: %(default)s",
    )

    packs = parser.add_argument_group("contents of packs, which decide the work of attention and head")
    packs.add_argument(
        "--packs", metavar="DIR", help="measure some packs of this directory, in place of the next three options"
    )
    packs.add_argument(
        "--document-length", type=count, metavar="N", default=2500, help="tokens of a document; default: %(default)s"
    )
    packs.add_argument(
        "--image-share",
        type=share,
        metavar="X",
        default=0.85,
        help="image tokens as a share of all tokens, 0 to 1; default: %(default)s",
    )
    add_old_name(packs, "--picture-share", "--image-share", share)
    packs.add_argument(
        "--trained-share",
        type=share,
        metavar="X",
        default=0.1,
        help="trained tokens as a share of all tokens, 0 to 1; default: %(default)s",
    )

    layout = parser.add_argument_group("parallel layout, under Megatron's names; default: that of one GPU")
    layout.add_argument(
        "--tensor-model-parallel-size", type=count, metavar="N", help="ranks that share each matrix; default: 1"
    )
    layout.add_argument(
        "--sequence-parallel", action="store_true", default=None, help="split tokens between layers over those ranks"
    )
    layout.add_argument("--pipeline-model-parallel-size", type=count, metavar="N", help="pipeline stages; default: 1")
    layout.add_argument(
        "--num-virtual-stages-per-pipeline-rank",
        type=count,
        metavar="N",
        help="interleaved stages of a rank; default: 1",
    )
    layout.add_argument(
        "--pipeline-model-parallel-layout",
        metavar="TEXT",
        help="the pipeline split: E embeddings, t a layer, L head, | between stages, such as 'Ett|ttL'; default: "
        "even, or by the costs of layers where they do not divide",
    )
    layout.add_argument(
        "--pre-buffer-pipeline-stages",
        type=count,
        metavar="N",
        help="pipeline stages that hold the pre-buffer alone; default: none",
    )
    layout.add_argument(
        "--context-parallel-size", type=count, metavar="N", help="ranks that share each pack; default: 1"
    )
    layout.add_argument(
        "--cp-comm-type", choices=("a2a", "allgather"), help="of context parallelism; default: the one that sends less"
    )
    layout.add_argument(
        "--expert-model-parallel-size",
        type=count,
        metavar="N",
        help="ranks that the experts of a layer are dealt to; default: 1",
    )
    layout.add_argument(
        "--expert-tensor-parallel-size",
        type=count,
        metavar="N",
        help="ranks that share each matrix of an expert; default: --tensor-model-parallel-size",
    )
    layout.add_argument(
        "--micro-batch-size", type=count, metavar="N", help="packs that a rank reads at once; default: 1"
    )
    for flag in ("use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather"):
        layout.add_argument(f"--{flag}", action="store_true", default=None, help="always on in a search")
    layout.add_argument("--optimizer", choices=("adam", "muon"), help="AdamW, or Muon for matrices; default: adam")
    layout.add_argument(
        "--use-megatron-fsdp", action="store_true", default=None, help="Megatron-FSDP; never in a search"
    )
    layout.add_argument(
        "--data-parallel-sharding-strategy",
        choices=("optim", "optim_grads", "optim_grads_params"),
        help="what Megatron-FSDP shards: ZeRO-1, 2 or 3; default: optim_grads_params",
    )
    layout.add_argument(
        "--fp8-param-gather", action="store_true", default=None, help="FP8: the parameters themselves are in 8 bits"
    )
    layout.add_argument(
        "--recompute-granularity",
        choices=("full", "selective"),
        help="activations computed again in the backward: all of a layer, or modules of it; default: none",
    )
    layout.add_argument(
        "--recompute-method",
        choices=("uniform", "block"),
        help="full: all layers in groups, or the first layers of each stage; no default",
    )
    layout.add_argument(
        "--recompute-num-layers", type=count, metavar="N", help="full: layers of a group or of a stage; default: 1"
    )
    layout.add_argument(
        "--recompute-modules",
        nargs="+",
        choices=("core_attn", "layernorm", "mlp", "moe", *ELEMENTWISE),
        help="selective: which modules; moe: router and experts; mlp_act: the output of SwiGLU; default: core_attn",
    )

    # Flags of Megatron that this command does not have.
    parser.set_defaults(**dict.fromkeys(UNEVEN_SPLIT_FLAGS))

    result = parser.add_argument_group("result")
    result.add_argument(
        "--search",
        action="store_true",
        help="rank the parallel layouts of --gpus that fit, by estimated tokens per second",
    )
    result.add_argument(
        "--top", type=count, metavar="N", default=15, help="parallel layouts to show; default: %(default)s"
    )
    result.add_argument("--json", action="store_true", help="print JSON, sizes in bytes and times in seconds")
    return parser.parse_args()


def refuse(message: str) -> NoReturn:
    """Replaces argparse's own error, which prints the names of all flags first."""
    raise ConfigError(f"{message}; --help lists all flags")


def count(text: str) -> int:
    """A whole number from 1 on, as an argument type."""
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1, as an argument type."""
    return _number(text, "a share from 0 to 1", lambda value: 0 <= value <= 1)


def gigabytes(text: str) -> float:
    """A number of gigabytes of 10**9 bytes, as an argument type."""
    return _number(text, "a number of gigabytes from 0 on", lambda value: 0 <= value < math.inf)


def _number(text: str, what: str, allowed: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def main() -> None:
    """Prints a plan, or ranks parallel layouts."""
    args = parse_arguments()
    given = {name: getattr(args, name) for name in LAYOUT if getattr(args, name) is not None}
    check_recomputation(given)
    sizes, workload, gpu = sizes_of(args.neo_model), workload_of(args), gpu_of(args)
    efficiency = Efficiency(reserved_bytes=args.reserve * 1e9)
    check_fully_sharded(args)
    if args.search:
        show_search(args, given, sizes, workload, gpu, efficiency)
        return
    vars(args).update(LAYOUT | given)
    args.overlap_grad_reduce |= args.use_megatron_fsdp  # always
    args.seq_length = workload.sequence_length
    plan = Plan.make(sizes, layout_of(args, sizes, workload), workload, args.training_stage, gpu, efficiency)
    print(json.dumps(plan.as_json(), indent=2) if args.json else describe(plan))


def check_recomputation(given: dict[str, Any]) -> None:
    """Raises ConfigError if flags of recomputation have no effect or contradict each other, as in training."""
    granularity = given.get("recompute_granularity")
    if granularity == "full" and "recompute_method" not in given:
        raise ConfigError("--recompute-granularity full needs to know which layers: add --recompute-method uniform")
    for name, wanted in {"modules": "selective", "method": "full", "num_layers": "full"}.items():
        if f"recompute_{name}" in given and granularity != wanted:
            flag = f"--recompute-{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is for --recompute-granularity {wanted}: add that, or leave {flag} out")


def check_fully_sharded(args: argparse.Namespace) -> None:
    """Raises ConfigError if flags of Megatron-FSDP have no effect."""
    if args.data_parallel_sharding_strategy and not args.use_megatron_fsdp:
        raise ConfigError("--data-parallel-sharding-strategy is for --use-megatron-fsdp: add it, or leave it out")
    if args.search and args.use_megatron_fsdp:
        raise ConfigError("--search never tries --use-megatron-fsdp: leave one of them out")


def show_search(
    args: argparse.Namespace,
    given: dict[str, Any],
    sizes: NeoSizes,
    workload: Workload,
    gpu: Gpu,
    efficiency: Efficiency,
) -> None:
    """Prints the best parallel layouts, and the plan of the first one."""
    if "recompute_modules" in given:
        given["recompute_modules"] = tuple(given["recompute_modules"])
    progress = Progress()
    plans, looked_at = search(
        *(sizes, args.gpus, workload, args.training_stage, gpu, args.global_batch_size, args.precision, efficiency),
        given=given,
        progress=progress,
    )
    progress.end()
    if args.json:
        print(json.dumps([plan.as_json() for plan in distinct(plans)[: args.top]], indent=2))
        return
    print(describe_search(plans, looked_at, args.top))
    print(f"\nthe first one:\n\n{shlex.join(flags(plans[0].layout))}\n\n{describe(plans[0])}")


class Progress:
    """Reports the progress of a search on stderr: on a terminal in one line, else in occasional lines."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (0.5 if self._terminal else 10)
        self._shown = False

    def __call__(self, looked_at: int, fit: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.5 if self._terminal else 10)
        self._shown = True
        text = f"searching: {looked_at:,} layouts looked at, {fit:,} fit"
        print(f"\r{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal and self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def workload_of(args: argparse.Namespace) -> Workload:
    """The workload of `--packs`, or of documents of one length."""
    if args.packs:
        # Reading packs needs torch, which nothing else here does.
        from neo_megatron.data.packs.index import PackIndex
        from neo_megatron.planning.packs import measure_packs

        index = PackIndex.open(args.packs)
        if args.seq_length not in (None, index.sequence_length):
            raise ConfigError(
                f"--packs {args.packs} holds packs of {index.sequence_length} tokens, --seq-length is "
                f"{args.seq_length}: leave it out, or pack again"
            )
        return measure_packs(args.packs)
    return Workload.of_alike_documents(
        args.seq_length or 16384, args.document_length, args.image_share, args.trained_share
    )


def gpu_of(args: argparse.Namespace) -> Gpu:
    """The GPU of `--gpu`, with `--gpu-memory` in place of its own."""
    gpu = GPUS[args.gpu]
    return gpu if args.gpu_memory is None else gpu.with_memory(args.gpu_memory * 1e9)


def layout_of(args: argparse.Namespace, sizes: NeoSizes, workload: Workload) -> Layout:
    """The layout of the flags, split into pipeline stages as by `pretrain_neo`."""
    args.world_size, args.num_layers = args.gpus, sizes.num_layers
    args.pipeline_model_parallel_layout, _ = choose_layout(args, sizes, workload)
    layout = Layout.from_arguments(args, args.precision)
    if refusal := layout.refusal(sizes, workload.sequence_length, args.training_stage):
        raise ConfigError(refusal)
    return layout
