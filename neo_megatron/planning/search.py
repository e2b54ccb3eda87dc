"""All layouts of a number of GPUs that can work and fit, ranked by the tokens per second that they are estimated at."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from itertools import product

from neo_megatron.model.config import ConfigError, NeoSizes
from neo_megatron.pipeline_layout import Costs, balanced_split, layout_string
from neo_megatron.planning.hardware import Efficiency, Gpu
from neo_megatron.planning.layout import Layout, Precision
from neo_megatron.planning.memory import pipeline_memory
from neo_megatron.planning.report import RECOMPUTATION, Plan, layout_text, recomputation_text, table
from neo_megatron.planning.workload import Workload

MICRO_BATCH_SIZES = (1, 2, 4)
VIRTUAL_SIZES = (1, 2, 3, 4, 5, 6)


def search(
    sizes: NeoSizes,
    gpus: int,
    workload: Workload,
    training_stage: int,
    gpu: Gpu,
    global_batch_size: int,
    precision: Precision = "bf16",
    efficiency: Efficiency | None = None,
) -> tuple[list[Plan], int]:
    """Plans that fit, best first, and how many layouts were looked at.

    The distributed optimizer and its overlaps are always on: they cost nothing. Layers that a pipeline does not divide
    evenly are cut by what they cost, as `pretrain_neo` cuts them.
    """
    plans, count = [], 0
    for layout in candidates(sizes, gpus, workload, training_stage, global_batch_size, precision, gpu.gpus_per_machine):
        count += 1
        memory = pipeline_memory(sizes, layout, workload, training_stage)
        reserved = (efficiency or Efficiency()).reserved_bytes
        if max(rank.total for rank in memory) + reserved <= gpu.memory:
            plans.append(Plan.make(sizes, layout, workload, training_stage, gpu, efficiency, memory))
    return sorted(plans, key=lambda plan: -plan.time.tokens_per_second), count


def candidates(
    sizes: NeoSizes,
    gpus: int,
    workload: Workload,
    training_stage: int,
    global_batch_size: int,
    precision: Precision,
    gpus_per_machine: int,
) -> Iterator[Layout]:
    """Every combination of sizes that Megatron and NEO's layers can work with; tensor ranks stay in one machine."""

    @cache
    def pipeline_cut(stages: int, full: bool) -> str | None:
        if sizes.num_layers % stages == 0:
            return None  # Megatron cuts evenly
        costs = Costs.of(sizes, training_stage, workload, recompute_layers=full)
        return layout_string(balanced_split(costs.layers, stages, costs.patch_embedding, costs.head))

    tensor_sizes = [size for size in _divisors(gpus) if size <= gpus_per_machine]
    for tensor, context in product(tensor_sizes, _divisors(gpus)):
        if gpus % (tensor * context):
            continue
        for pipeline, virtual in product(_divisors(gpus // (tensor * context)), VIRTUAL_SIZES):
            data = gpus // (tensor * context * pipeline)
            if pipeline * virtual > sizes.num_layers:
                continue
            for micro_batch, recomputation, sequence_parallel in product(
                MICRO_BATCH_SIZES, RECOMPUTATION.values(), (True, False)
            ):
                if global_batch_size % (micro_batch * data):
                    continue
                layout = Layout(
                    tensor_model_parallel_size=tensor,
                    sequence_parallel=sequence_parallel,
                    pipeline_model_parallel_size=pipeline,
                    virtual_pipeline_model_parallel_size=virtual,
                    pipeline_model_parallel_layout=pipeline_cut(
                        pipeline * virtual, recomputation["recompute_granularity"] == "full"
                    ),
                    context_parallel_size=context,
                    data_parallel_size=data,
                    micro_batch_size=micro_batch,
                    global_batch_size=global_batch_size,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=True,
                    overlap_param_gather=True,
                    precision=precision,
                    **recomputation,
                )
                if layout.refusal(sizes, workload.sequence_length) is None:
                    yield layout


def describe_search(plans: list[Plan], count: int, top: int) -> str:
    """The best plans as a table.

    Raises:
        ConfigError: none fits.
    """
    if not plans:
        raise ConfigError(
            f"none of the {count:,} layouts fits: take more GPUs, GPUs with more memory, or shorter packs"
        )
    rows: list[list[str]] = [
        ["layout", "micro-batch", "recomputation", "GB", "step", "bubble", "MFU", "tokens/s/GPU"],
        *(
            [
                layout_text(plan.layout),
                str(plan.layout.micro_batch_size),
                recomputation_text(plan.layout),
                f"{plan.needed / 1e9:.1f}",
                f"{plan.time.seconds:.2f} s",
                f"{plan.time.bubble:.1%}",
                f"{plan.time.mfu:.1%}",
                f"{plan.time.tokens_per_second:,.0f}",
            ]
            for plan in plans[:top]
        ),
    ]
    return f"{len(plans):,} of {count:,} layouts fit; GB with what is kept free\n\n{table(rows, left=3)}"


def flags(layout: Layout) -> list[str]:
    """The layout as flags of `pretrain_neo`."""
    written = []
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if field.name in _NOT_FLAGS or value == field.default or value is None:
            continue
        if field.name == "virtual_pipeline_model_parallel_size" and layout.pipeline_model_parallel_layout:
            continue  # the layout says it
        name = _OTHER_NAMES.get(field.name, field.name)
        written.append(f"--{name.replace('_', '-')}")
        if value is not True:
            written += [str(part) for part in (value if isinstance(value, tuple) else (value,))]
    if layout.recompute_granularity == "full" and layout.recompute_num_layers == 1:
        written += ["--recompute-num-layers", "1"]
    return written + (["--bf16"] if layout.precision != "fp32" else [])


_NOT_FLAGS = {"data_parallel_size", "precision", "transformer_impl"}
_OTHER_NAMES = {"virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank"}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
