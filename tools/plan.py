"""Plans a run without a GPU: what every rank holds, sends and takes, and whether it fits; or the best layouts.

    python tools/plan.py --neo-model neo-9b --training-stage 2 --seq-length 18432 --gpus 64 \
        --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer
    python tools/plan.py --neo-model neo-9b --training-stage 2 --seq-length 18432 --search --gpus 256

Flags of layout and recomputation are Megatron's.
"""

from neo_megatron import command_line
from neo_megatron.paths import Wanted

if __name__ == "__main__":  # before the imports below, which take seconds
    command_line.begin("plan", {"--neo-model": Wanted.SIZES, "--packs": Wanted.PACKS})


import argparse
import json

from neo_megatron import presets
from neo_megatron.model.config import ConfigError, NeoSizes
from neo_megatron.pipeline_layout import UNEVEN_SPLIT_FLAGS, choose_layout
from neo_megatron.planning.hardware import GPUS, Efficiency, Gpu
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.report import Plan, describe
from neo_megatron.planning.search import describe_search, flags, search
from neo_megatron.planning.workload import Workload


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = parser.add_argument_group("run")
    run.add_argument("--neo-model", required=True, metavar="SIZE", help="neo-2b, neo-9b, tiny, or a directory")
    run.add_argument("--training-stage", type=int, default=2, choices=(1, 2, 3))
    run.add_argument("--seq-length", type=int, help="tokens of a pack; default: as in --packs, else 16384")
    run.add_argument("--global-batch-size", type=int, default=256, help="packs of a step (%(default)s)")
    run.add_argument("--precision", choices=("bf16", "fp8", "fp32"), default="bf16")
    run.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="local: the kernels of a CPU",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, default=8)
    machine.add_argument("--gpu", choices=GPUS, default="h100")
    machine.add_argument("--gpu-memory", type=float, metavar="GB", help="instead of that GPU's")
    machine.add_argument("--reserve", type=float, metavar="GB", default=5.0, help="to keep free of it (%(default)s)")

    packs = parser.add_argument_group("packs, which decide the work of attention and head")
    packs.add_argument("--packs", metavar="DIR", help="measure some of these")
    packs.add_argument("--document-length", type=int, default=2500, help="tokens of a document (%(default)s)")
    packs.add_argument("--picture-share", type=float, default=0.85, help="of a document's tokens (%(default)s)")
    packs.add_argument("--trained-share", type=float, default=0.1, help="of a document's tokens (%(default)s)")

    layout = parser.add_argument_group("layout, under Megatron's names")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1)
    layout.add_argument("--sequence-parallel", action="store_true")
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    layout.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    layout.add_argument("--pipeline-model-parallel-layout")
    layout.add_argument("--pre-buffer-pipeline-stages", type=int, default=0)
    layout.add_argument("--context-parallel-size", type=int, default=1)
    layout.add_argument("--cp-comm-type", choices=("a2a", "allgather"))
    layout.add_argument("--micro-batch-size", type=int, default=1)
    for flag in ("use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather"):
        layout.add_argument(f"--{flag}", action="store_true")
    layout.add_argument("--recompute-granularity", choices=("full", "selective"))
    layout.add_argument("--recompute-method", choices=("uniform", "block"))
    layout.add_argument("--recompute-num-layers", type=int, default=1)
    layout.add_argument("--recompute-modules", nargs="+", default=["core_attn"])

    # Flags of Megatron that this tool leaves out.
    parser.set_defaults(**dict.fromkeys(UNEVEN_SPLIT_FLAGS))

    result = parser.add_argument_group("result")
    result.add_argument("--search", action="store_true", help="rank the layouts of --gpus that fit")
    result.add_argument("--top", type=int, default=15, help="layouts to show (%(default)s)")
    result.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    sizes, workload, gpu = presets.sizes(args.neo_model), workload_of(args), gpu_of(args)
    efficiency = Efficiency(reserved_bytes=args.reserve * 1e9)
    if args.search:
        show_search(args, sizes, workload, gpu, efficiency)
        return
    args.seq_length = workload.sequence_length
    plan = Plan.make(sizes, layout_of(args, sizes, workload), workload, args.training_stage, gpu, efficiency)
    print(json.dumps(plan.as_json(), indent=2) if args.json else describe(plan))


def show_search(
    args: argparse.Namespace, sizes: NeoSizes, workload: Workload, gpu: Gpu, efficiency: Efficiency
) -> None:
    plans, count = search(
        sizes, args.gpus, workload, args.training_stage, gpu, args.global_batch_size, args.precision, efficiency
    )
    if args.json:
        print(json.dumps([plan.as_json() for plan in plans[: args.top]], indent=2))
        return
    print(describe_search(plans, count, args.top))
    print(f"\nthe first one:\n\n{' '.join(flags(plans[0].layout))}\n\n{describe(plans[0])}")


def workload_of(args: argparse.Namespace) -> Workload:
    if args.packs:
        # Reading packs takes torch, which nothing else here does.
        from neo_megatron.data.pack_index import PackIndex
        from neo_megatron.planning.packs import measure_packs

        index = PackIndex.open(args.packs)
        if args.seq_length not in (None, index.sequence_length):
            raise ConfigError(
                f"--packs {args.packs} holds packs of {index.sequence_length} tokens, --seq-length is "
                f"{args.seq_length}: leave it out, or pack again"
            )
        return measure_packs(index)
    return Workload.of_alike_documents(
        args.seq_length or 16384, args.document_length, args.picture_share, args.trained_share
    )


def gpu_of(args: argparse.Namespace) -> Gpu:
    gpu = GPUS[args.gpu]
    return gpu if args.gpu_memory is None else gpu.with_memory(args.gpu_memory * 1e9)


def layout_of(args: argparse.Namespace, sizes: NeoSizes, workload: Workload) -> Layout:
    """The layout of the flags, cut into pipeline stages as `pretrain_neo` cuts it."""
    args.world_size, args.num_layers = args.gpus, sizes.num_layers
    args.pipeline_model_parallel_layout, _ = choose_layout(args, sizes, workload)
    layout = Layout.from_arguments(args, args.precision)
    if refusal := layout.refusal(sizes, workload.sequence_length):
        raise ConfigError(refusal)
    return layout


if __name__ == "__main__":
    command_line.run("plan", main, ConfigError)
