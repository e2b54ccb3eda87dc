"""Searches the parallel layouts of a number of GPUs that fit, ranked by estimated tokens per second."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from math import isqrt, prod
from typing import Any

from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.hardware import Efficiency, Gpu
from neo_megatron.planning.layout import Layout, Precision, layout_stages
from neo_megatron.planning.memory import pipeline_memory
from neo_megatron.planning.pipeline_split import Costs, balanced_split, layout_string, split_pre_buffer
from neo_megatron.planning.report import Plan, layout_text, recomputation_text, recomputations, table
from neo_megatron.planning.workload import Workload

MICRO_BATCH_SIZES = (1, 2, 4)
VIRTUAL_SIZES = (1, 2, 3, 4, 5, 6)
# Two plans of the same parallel sizes are near-duplicates unless one saves this share of the other's memory.
WORTH_SAVING = 0.1


def search(
    sizes: NeoSizes,
    gpus: int,
    workload: Workload,
    training_stage: int,
    gpu: Gpu,
    global_batch_size: int,
    precision: Precision = "bf16",
    efficiency: Efficiency | None = None,
    given: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Plan], int]:
    """Plans that fit, best first, and the number of layouts that were tried.

    The distributed optimizer and its overlaps are always on: they cost nothing. Layers that a pipeline does not divide
    evenly are cut by what they cost, as `pretrain_neo` cuts them.

    Args:
        given: flags of the command line that all layouts must have, under Megatron's names.
        progress: called now and then with the numbers of layouts tried and of those that fit.

    Raises:
        ConfigError: there is no layout to try, or the GPU lacks the precision.
    """
    plans: list[Plan] = []
    refusals: list[str] = []
    count = 0
    every = candidates(
        *(sizes, gpus, workload, training_stage, global_batch_size, precision, gpu.gpus_per_machine),
        given=given,
        refusals=refusals,
    )
    reserved = (efficiency or Efficiency()).reserved_bytes
    for layout in every:
        count += 1
        memory = pipeline_memory(sizes, layout, workload, training_stage)
        if max(rank.total for rank in memory) + reserved <= gpu.memory:
            plans.append(Plan.make(sizes, layout, workload, training_stage, gpu, efficiency, memory))
        if progress and count % 50 == 0:
            progress(count, len(plans))
    if not count:
        raise ConfigError(_nothing_to_look_at(gpus, global_batch_size, given or {}, refusals))
    return sorted(plans, key=lambda plan: -plan.time.tokens_per_second), count


def candidates(
    sizes: NeoSizes,
    gpus: int,
    workload: Workload,
    training_stage: int,
    global_batch_size: int,
    precision: Precision,
    gpus_per_machine: int,
    given: Mapping[str, Any] | None = None,
    refusals: list[str] | None = None,
) -> Iterator[Layout]:
    """Every combination of sizes that Megatron and NEO's layers can work with; tensor ranks stay in one machine.

    Args:
        given: see `search`.
        refusals: collects why combinations cannot work.
    """
    given, refusals = given or {}, [] if refusals is None else refusals
    choices = _Choices(given, sizes, training_stage, workload)
    tensor_sizes = [size for size in _divisors(gpus) if size <= gpus_per_machine]
    for tensor, context in product(
        choices.of("tensor_model_parallel_size", tensor_sizes), choices.of("context_parallel_size", _divisors(gpus))
    ):
        if gpus % (tensor * context):
            continue
        pipelines = choices.of("pipeline_model_parallel_size", _divisors(gpus // (tensor * context)))
        for pipeline, virtual in product(pipelines, choices.virtual_sizes):
            data, rest = divmod(gpus, tensor * context * pipeline)
            if rest or not data or pipeline * virtual > sizes.num_layers:
                continue
            for micro_batch, recomputation, sequence_parallel, (experts, expert_tensor) in product(
                choices.of("micro_batch_size", MICRO_BATCH_SIZES),
                choices.recomputations,
                choices.sequence_parallel(tensor),
                choices.experts(tensor, gpus // pipeline),
            ):
                if global_batch_size % (micro_batch * data):
                    continue
                try:
                    layout = Layout(
                        tensor_model_parallel_size=tensor,
                        sequence_parallel=sequence_parallel,
                        pipeline_model_parallel_size=pipeline,
                        virtual_pipeline_model_parallel_size=choices.virtual(pipeline, virtual),
                        pipeline_model_parallel_layout=choices.pipeline_cut(
                            pipeline, virtual, recomputation["recompute_granularity"] == "full"
                        ),
                        context_parallel_size=context,
                        cp_comm_type=given.get("cp_comm_type") if context > 1 else None,
                        expert_model_parallel_size=experts,
                        expert_tensor_parallel_size=expert_tensor,
                        data_parallel_size=data,
                        micro_batch_size=micro_batch,
                        global_batch_size=global_batch_size,
                        use_distributed_optimizer=True,
                        overlap_grad_reduce=True,
                        overlap_param_gather=True,
                        optimizer=given.get("optimizer", "adam"),
                        precision=precision,
                        fp8_param_gather=given.get("fp8_param_gather", False),
                        transformer_impl=given.get("transformer_impl", "transformer_engine"),
                        attention_backend=given.get("attention_backend", "auto"),
                        **recomputation,
                    )
                    layout.chunks(sizes)
                except ConfigError as error:  # the flags do not allow such a split
                    refusals.append(str(error))
                    continue
                if refusal := layout.refusal(sizes, workload.sequence_length, training_stage):
                    refusals.append(refusal)
                else:
                    yield layout


class _Choices:
    """The values of each flag that a search tries: all, or those that are given."""

    def __init__(self, given: Mapping[str, Any], sizes: NeoSizes, training_stage: int, workload: Workload) -> None:
        self._given = given
        self._sizes = sizes
        self._costs = cache(lambda full: Costs.of(sizes, training_stage, workload, recompute_layers=full))
        self._layout: str | None = given.get("pipeline_model_parallel_layout")
        self._pre_buffer_stages: int = given.get("pre_buffer_pipeline_stages", 0)
        virtual = given.get("num_virtual_stages_per_pipeline_rank")
        self.virtual_sizes = (1,) if self._layout else VIRTUAL_SIZES if virtual is None else (virtual,)
        recomputation = {name: value for name, value in given.items() if name.startswith("recompute_")}
        self.recomputations = [recomputation] if recomputation else list(recomputations(sizes).values())
        self._cut = cache(self._cut_by_costs)

    def of(self, name: str, values: Any) -> Any:
        return (self._given[name],) if name in self._given else values

    def sequence_parallel(self, tensor: int) -> tuple[bool, ...]:
        if self._given.get("sequence_parallel"):
            return (True,)
        if tensor > 1 and self._sizes.num_experts:
            return (True,)
        return (True, False) if tensor > 1 else (False,)

    def experts(self, tensor: int, ranks: int) -> list[tuple[int, int | None]]:
        """Expert-parallel and expert-tensor-parallel sizes that divide the ranks of a pipeline stage.

        An expert is shared by all tensor-parallel ranks, or by none.
        """
        experts = self._sizes.num_experts
        shares = self.of("expert_tensor_parallel_size", (None, 1) if experts and tensor > 1 else (None,))
        counts = self.of("expert_model_parallel_size", _divisors(experts) if experts else (1,))
        given = "expert_model_parallel_size" in self._given  # what is given and cannot work is refused
        return [
            (count, share)
            for share, count in product(shares, counts)
            if given or ranks % (count * (share or tensor)) == 0
        ]

    def virtual(self, pipeline: int, virtual: int) -> int:
        """Virtual stages of a rank; a given pipeline layout decides their number."""
        return len(layout_stages(self._layout)) // pipeline if self._layout else virtual

    def pipeline_cut(self, pipeline: int, virtual: int, full: bool) -> str | None:
        """The pipeline split. Raises ConfigError if there is none."""
        return self._layout or self._cut(pipeline, virtual, full)

    def _cut_by_costs(self, pipeline: int, virtual: int, full: bool) -> str | None:
        sizes, stages = self._sizes, pipeline * virtual
        if self._pre_buffer_stages:
            layers = sizes.pre_buffer_layers
            return layout_string(
                split_pre_buffer(self._costs(full), layers, self._pre_buffer_stages, pipeline, virtual)
            )
        if sizes.num_layers % stages == 0:
            return None  # Megatron splits evenly
        costs = self._costs(full)
        return layout_string(balanced_split(costs.layers, stages, costs.patch_embedding, costs.head))


def _nothing_to_look_at(gpus: int, global_batch_size: int, given: Mapping[str, Any], refusals: list[str]) -> str:
    sizes = {name: size for name, size in given.items() if name in _PARALLEL}
    ranks = prod(sizes.values())
    if gpus % ranks:
        flags = " x ".join(f"{_flag(name)} {size}" for name, size in sizes.items())
        return f"{flags} is {ranks} GPUs, and --gpus {gpus} is not a multiple of that: choose other sizes"
    if given and refusals:
        return f"no layout of --gpus {gpus} and the given flags can work; the first reason: {refusals[0]}"
    return (
        f"--global-batch-size {global_batch_size} cannot be divided over the data-parallel ranks of any layout of "
        f"--gpus {gpus}: choose a larger batch, fewer GPUs, or numbers with more common divisors"
    )


def distinct(plans: list[Plan]) -> list[Plan]:
    """The plans, best first, without near-duplicates.

    A plan is left out if it differs from a faster one only in virtual stages, sequence parallelism or recomputation and
    saves less than a tenth of its memory.
    """
    kept: dict[tuple[int, ...], list[Plan]] = {}
    for plan in plans:
        layout = plan.layout
        alike = kept.setdefault(
            (
                layout.tensor_model_parallel_size,
                layout.pipeline_model_parallel_size,
                layout.context_parallel_size,
                layout.expert_model_parallel_size,
                layout.expert_tensor_ranks,
                layout.micro_batch_size,
            ),
            [],
        )
        if all(plan.needed <= (1 - WORTH_SAVING) * other.needed for other in alike):
            alike.append(plan)
    listed = {id(plan) for alike in kept.values() for plan in alike}
    return [plan for plan in plans if id(plan) in listed]


def describe_search(plans: list[Plan], count: int, top: int) -> str:
    """The best plans as a table, without near-duplicates.

    Raises:
        ConfigError: none fits.
    """
    listed = distinct(plans)
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
            for plan in listed[:top]
        ),
    ]
    return (
        f"{len(plans):,} of {count:,} layouts fit; the first {min(top, len(listed)):,} of {len(listed):,} that differ; "
        f"GB with what is kept free\n\n{table(rows, left=3)}"
    )


def flags(layout: Layout) -> list[str]:
    """The layout as a complete list of flags of `pretrain_neo`, to be quoted for a shell."""
    written = []
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if field.name in _NOT_FLAGS or value is None or (value == field.default and field.name not in _NEEDED):
            continue
        if field.name == "virtual_pipeline_model_parallel_size" and layout.pipeline_model_parallel_layout:
            continue  # implied by the layout
        name = _OTHER_NAMES.get(field.name, field.name)
        written.append(_flag(name))
        if value is not True:
            written += [str(part) for part in (value if isinstance(value, tuple) else (value,))]
    if layout.recompute_granularity == "full" and layout.recompute_num_layers == 1:
        written += ["--recompute-num-layers", "1"]
    if layout.precision == "fp8":
        written += ["--fp8-format", "hybrid", "--fp8-recipe", layout.fp8_recipe]
    return written + (["--bf16"] if layout.precision != "fp32" else [])


_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
_NOT_FLAGS = {"data_parallel_size", "precision"}
_NEEDED = {"micro_batch_size", "global_batch_size"}
_OTHER_NAMES = {"virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]
