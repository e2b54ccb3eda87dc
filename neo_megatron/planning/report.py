"""A plan as text and tables: memory, traffic and time of every pipeline rank, and whether it fits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.flops import attention_core_flops, layer_products, model_flops
from neo_megatron.planning.hardware import Efficiency, Gpu
from neo_megatron.planning.layout import Chunk, Layout, mlp_module
from neo_megatron.planning.memory import RankMemory, pipeline_memory
from neo_megatron.planning.parameters import chunk_parameters
from neo_megatron.planning.step_time import StepTime, step_time
from neo_megatron.planning.workload import Workload


def recomputations(sizes: NeoSizes) -> dict[str, dict[str, Any]]:
    """The choices that are compared, by --recompute-modules; full is uniform, layer by layer."""
    mlp = mlp_module(bool(sizes.num_experts))
    elementwise = [("qkv_heads",)] if sizes.num_experts else [("mlp_act",), ("mlp_act", "qkv_heads")]
    return {
        "none": dict(recompute_granularity=None),
        **{
            " ".join(modules): dict(recompute_granularity="selective", recompute_modules=modules)
            for modules in (("core_attn",), ("layernorm",), *elementwise, (mlp,), ("layernorm", mlp))
        },
        "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    }


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    sizes: NeoSizes
    layout: Layout
    workload: Workload
    training_stage: int
    gpu: Gpu
    efficiency: Efficiency
    memory: list[RankMemory]
    time: StepTime

    @classmethod
    def make(
        cls,
        sizes: NeoSizes,
        layout: Layout,
        workload: Workload,
        training_stage: int,
        gpu: Gpu,
        efficiency: Efficiency | None = None,
        memory: list[RankMemory] | None = None,
    ) -> "Plan":
        """Plans. Raises ConfigError if the layers cannot be divided like this, or the GPU lacks precision or kernel."""
        if layout.attention_backend == "flash" and gpu.capability != (9, 0):
            raise ConfigError(
                f"--attention-backend flash: FlashAttention 4 has NEO's mask on compute capability 9.0 only, and "
                f"{gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}: choose auto"
            )
        efficiency = efficiency or Efficiency()
        memory = memory or pipeline_memory(sizes, layout, workload, training_stage)
        time = step_time(sizes, layout, workload, training_stage, gpu, efficiency)
        return cls(sizes, layout, workload, training_stage, gpu, efficiency, memory, time)

    @property
    def needed(self) -> float:
        """Bytes of the fullest rank, reserve included."""
        return max(rank.total for rank in self.memory) + self.efficiency.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.needed <= self.gpu.memory

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": dataclasses.asdict(self.layout),
            # `picture_share` is what version 0.1.0 called `image_share`; scripts may read it.
            "workload": dataclasses.asdict(self.workload) | {"picture_share": self.workload.image_share},
            "training_stage": self.training_stage,
            "gpu": dataclasses.asdict(self.gpu),
            "efficiency": dataclasses.asdict(self.efficiency),
            "memory": [dataclasses.asdict(rank) | {"total": rank.total} for rank in self.memory],
            "time": dataclasses.asdict(self.time),
            "needed": self.needed,
            "fits": self.fits,
        }


def table(rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Aligns rows in columns, the first `left` of them flush left; the first row is the header."""
    texts = [[str(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    return "\n".join(
        "  ".join(
            value.ljust(width) if column < left else value.rjust(width)
            for column, (value, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    )


def describe(plan: Plan) -> str:
    """The complete plan as text for people. Memory in GB of 1,000,000,000 bytes, as GPUs are sold."""
    return "\n\n".join([_header(plan), _memory(plan), _verdict(plan), _recomputation(plan), _wire(plan), _time(plan)])


def layout_text(layout: Layout) -> str:
    """A layout in a few words."""
    words = [f"TP {layout.tensor_model_parallel_size}" + (" with SP" if layout.sequence_parallel else "")]
    words.append(f"PP {layout.pipeline_model_parallel_size}")
    if layout.virtual_pipeline_model_parallel_size > 1:
        words[-1] += f" x VP {layout.virtual_pipeline_model_parallel_size}"
    words.append(f"CP {layout.context_parallel_size}")
    if layout.experts_apart:
        words.append(f"EP {layout.expert_model_parallel_size}")
        if layout.expert_tensor_ranks != layout.tensor_model_parallel_size:
            words[-1] += f" x ETP {layout.expert_tensor_ranks}"
    words.append(f"DP {layout.data_parallel_size}")
    if layout.use_megatron_fsdp:
        zero = 3 if layout.shards_parameters else 2 if layout.shards_gradients else 1
        words[-1] += f" with ZeRO-{zero}"
    return ", ".join(words)


def recomputation_text(layout: Layout) -> str:
    """The recomputation of a layout in a few words."""
    if layout.recompute_granularity == "full":
        return f"full, {layout.recompute_method} {layout.recompute_num_layers}"
    if layout.recompute_granularity == "selective":
        return "selective: " + " ".join(layout.recompute_modules)
    return "none"


def _header(plan: Plan) -> str:
    sizes, layout, workload = plan.sizes, plan.layout, plan.workload
    model = chunk_parameters(
        sizes, Layout(), Chunk(0, sizes.num_layers, embedding=True, head=True), plan.training_stage
    )
    count, trained = sum(p.total for p in model), sum(p.total for p in model if p.trained)
    at_work = ""
    if sizes.num_experts:
        idle = sum(p.total for p in model if p.expert) * (1 - sizes.experts_per_token / sizes.num_experts)
        at_work = f"{count - round(idle):,} work on a token and "
    flops = model_flops(sizes, plan.training_stage, workload).total(sizes)
    core = sizes.num_layers * attention_core_flops(sizes, workload.mean_keys).forward
    products = sizes.num_layers * layer_products(sizes).forward
    head = flops.forward - core - products
    return "\n".join(
        [
            f"model        {count:,} parameters, of which {at_work}{trained:,} train in stage {plan.training_stage}",
            f"packs        {workload.sequence_length:,} tokens; a query sees {workload.mean_keys:,.0f} keys in the "
            f"mean; {workload.image_share:.0%} images, {workload.trained_share:.0%} trained ({workload.source})",
            f"layout       {layout.world_size:,} GPUs: {layout_text(layout)}; {layout.micro_batches:,} micro-batches "
            f"of {layout.micro_batch_size} in a global batch of {layout.global_batch_size:,} packs; "
            f"{layout.precision}; recomputation {recomputation_text(layout)}",
            f"operations   {flops.model / 1e9:,.1f} G a token and step; forward {flops.forward / 1e9:,.1f} G: products "
            f"{products / flops.forward:.0%}, attention {core / flops.forward:.0%}, head and patches "
            f"{head / flops.forward:.0%}",
        ]
    )


def _layers(chunks: Sequence[Chunk]) -> str:
    def text(chunk: Chunk) -> str:
        layers = f"{chunk.first_layer}-{chunk.first_layer + chunk.layers - 1}" if chunk.layers else "none"
        return "embeddings " * chunk.embedding + layers + " head" * chunk.head

    return ", ".join(text(chunk) for chunk in chunks)


def _memory(plan: Plan) -> str:
    header = ["pipeline rank", "layers", "parameters", "gradients", "optimizer", "activations", "working", "GB in all"]
    fp8 = plan.layout.precision == "fp8"
    if fp8:
        header.insert(3, "in 8 bits")
    rows: list[list[Any]] = [header]
    for rank, (memory, chunks) in enumerate(zip(plan.memory, plan.layout.chunks(plan.sizes), strict=True)):
        state = memory.state
        parts = [state.parameters, state.gradients, state.optimizer, memory.activations, memory.working, memory.total]
        if fp8:
            parts.insert(1, memory.fp8_weights)
        rows.append([rank, _layers(chunks), *(_gigabytes(part) for part in parts)])
    return table(rows, left=2)


def _verdict(plan: Plan) -> str:
    available, spare = plan.gpu.memory, plan.gpu.memory - plan.needed
    fullest = max(range(len(plan.memory)), key=lambda rank: plan.memory[rank].total)
    kept_free = f"with {_gigabytes(plan.efficiency.reserved_bytes)} GB kept free"
    if plan.fits:
        return f"fits: rank {fullest} needs {_gigabytes(plan.needed)} of {_gigabytes(available)} GB {kept_free}"
    memory = plan.memory[fullest]
    reasons = {
        "activations": (memory.activations + memory.working, "recompute more, or raise TP with SP, CP or PP"),
        "optimizer state": (memory.state.optimizer, "--use-distributed-optimizer over more GPUs, or raise TP or PP"),
        "parameters and gradients": (memory.state.parameters + memory.state.gradients, "raise TP or PP"),
    }
    reason = max(reasons, key=lambda name: reasons[name][0])
    return (
        f"DOES NOT FIT: rank {fullest} needs {_gigabytes(plan.needed)} GB {kept_free}, {_gigabytes(-spare)} GB more "
        f"than {_gigabytes(available)}; most of it are {reason}: {reasons[reason][1]}"
    )


def _recomputation(plan: Plan) -> str:
    rows: list[list[Any]] = [["recomputation", "activations and working, fullest rank", "GB in all", "step"]]
    for name, choice in recomputations(plan.sizes).items():
        layout = dataclasses.replace(plan.layout, **choice)
        if layout.refusal(plan.sizes, plan.workload.sequence_length, plan.training_stage):
            continue  # such as heads under context parallelism
        other = Plan.make(plan.sizes, layout, plan.workload, plan.training_stage, plan.gpu, plan.efficiency)
        fullest = max(other.memory, key=lambda memory: memory.total)
        active = fullest.activations + fullest.working
        rows.append([name, _gigabytes(active), _gigabytes(fullest.total), f"{other.time.seconds:.2f} s"])
    return table(rows)


def _wire(plan: Plan) -> str:
    kinds = [field.name for field in dataclasses.fields(plan.time.traffic[0])]
    rows: list[list[Any]] = [["GB sent by a rank in a step", *kinds]]
    for rank, traffic in enumerate(plan.time.traffic):
        rows.append([f"pipeline rank {rank}", *(_gigabytes(getattr(traffic, kind)) for kind in kinds)])
    return table(rows)


def _time(plan: Plan) -> str:
    time = plan.time
    return (
        f"step         {time.seconds:.2f} s on {plan.gpu.name}: {time.tokens_per_second:,.0f} tokens per second and "
        f"GPU, MFU {time.mfu:.1%}, pipeline bubble {time.bubble:.1%}\n"
        f"             peak rates: {plan.gpu.describe(plan.layout.precision)}\n"
        f"             {plan.efficiency.describe()}"
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}" if count < 1e11 else f"{count / 1e9:,.0f}"
