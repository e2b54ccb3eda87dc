"""Chooses the pipeline split from the costs of layers, as a `--pipeline-model-parallel-layout` for Megatron.

Layers differ: a frozen one has no weight gradient, the first stage has the patch embedding, the last one the head. The
slowest stage sets the pace of a pipeline, so the split minimises the cost of the costliest stage.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.flops import Flops, model_flops
from neo_megatron.planning.layout import layout_stages
from neo_megatron.planning.workload import Workload

# Megatron's flags that also set the pipeline split; with one of them Megatron decides alone.
UNEVEN_SPLIT_FLAGS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_per_virtual_pipeline_stage",
)


@dataclass(frozen=True)
class Costs:
    """Operations of a training step for one token: of the patch embedding, of each decoder layer, and of the head."""

    patch_embedding: float
    layers: tuple[float, ...]
    head: float

    @classmethod
    def of(cls, sizes: NeoSizes, training_stage: int, workload: Workload, recompute_layers: bool = False) -> "Costs":
        """Costs of a model; with ``recompute_layers`` (`--recompute-granularity full`) layers run forward twice."""
        flops = model_flops(sizes, training_stage, workload)

        def layer(part: Flops) -> float:
            return part.training + (part.forward if recompute_layers else 0)

        pre_buffer, post_llm = layer(flops.pre_buffer_layer), layer(flops.post_llm_layer)
        layers = (pre_buffer,) * sizes.pre_buffer_layers + (post_llm,) * sizes.post_llm_layers
        return cls(flops.patch_embedding.training, layers, flops.head.training)

    def stages(self, counts: Sequence[int]) -> list[float]:
        """Cost of each stage, given the number of its layers; the first also embeds, the last has the head."""
        starts = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
        costs = [sum(self.layers[start:end]) for start, end in zip(starts, starts[1:], strict=False)]
        costs[0] += self.patch_embedding
        costs[-1] += self.head
        return costs


def choose_layout(args: Namespace, sizes: NeoSizes, workload: Workload | None = None) -> tuple[str | None, str]:
    """Chooses the pipeline split of a run, before Megatron's `validate_args`.

    `--pipeline-model-parallel-layout` wins. Else `--pre-buffer-pipeline-stages` cuts between pre-buffer and post-LLM,
    and each part by its costs. Else Megatron splits evenly; layers that it cannot split evenly are cut by their costs.
    Virtual stages, if any, are counted and cut instead, in the order of the layers.

    Args:
        workload: of the packs to train on; by default that of assumed packs.

    Returns:
        The layout string, ``None`` to leave the split to Megatron; and a table for people, empty without a pipeline.

    Raises:
        ConfigError: fewer layers than stages, in either part; a layout that does not fit the model.
    """
    ranks, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank or 1
    layout, pre_buffer_stages = args.pipeline_model_parallel_layout, args.pre_buffer_pipeline_stages
    left_to_megatron = ranks == 1 or any(getattr(args, flag) for flag in UNEVEN_SPLIT_FLAGS)
    if left_to_megatron and not layout and not pre_buffer_stages:
        return None, ""
    if args.seq_length is None:
        raise ConfigError("the pipeline is cut by what its layers cost: give --train-data-path or --seq-length")
    workload = workload or Workload.of_alike_documents(args.seq_length)
    costs = Costs.of(sizes, args.training_stage, workload, recompute_layers=args.recompute_granularity == "full")
    advice = ""
    if layout:
        counts = layer_counts(layout, sizes.num_layers, ranks)
    elif pre_buffer_stages:
        counts = split_pre_buffer(costs, sizes.pre_buffer_layers, pre_buffer_stages, ranks, virtual)
        layout = layout_string(counts)
    else:
        counts = balanced_split(costs.layers, ranks * virtual, costs.patch_embedding, costs.head)
        if sizes.num_layers % len(counts):
            layout = layout_string(counts)
        else:
            even = [sizes.num_layers // len(counts)] * len(counts)
            advice, counts = _advice(even, counts, costs, ranks), even
    return layout, f"{describe(counts, costs, ranks)} (packs: {workload.source}){advice}"


def split_pre_buffer(
    costs: Costs, pre_buffer_layers: int, pre_buffer_stages: int, ranks: int, virtual: int = 1
) -> list[int]:
    """Layers of each stage, where the first `pre_buffer_stages` hold the pre-buffer and no other layer."""
    where = f"--pre-buffer-pipeline-stages {pre_buffer_stages} with --pipeline-model-parallel-size {ranks}"
    if virtual > 1:
        where += f" and --num-virtual-stages-per-pipeline-rank {virtual}"
    post_llm_stages = ranks * virtual - pre_buffer_stages
    if pre_buffer_stages < 1 or post_llm_stages < 1:
        raise ConfigError(f"{where}: both the pre-buffer and the post-LLM need at least one stage")
    parts = costs.layers[:pre_buffer_layers], costs.layers[pre_buffer_layers:]
    if len(parts[0]) < pre_buffer_stages or len(parts[1]) < post_llm_stages:
        raise ConfigError(
            f"{where}: {len(parts[0])} pre-buffer and {len(parts[1])} post-LLM layers are fewer than their stages"
        )
    return [
        *balanced_split(parts[0], pre_buffer_stages, before=costs.patch_embedding),
        *balanced_split(parts[1], post_llm_stages, after=costs.head),
    ]


def balanced_split(layers: Sequence[float], stages: int, before: float = 0.0, after: float = 0.0) -> list[int]:
    """The number of layers of each stage, at least one, that minimises the cost of the costliest stage.

    Of those splits it is the most even one (least sum of squares); of those, one with few layers in the early stages,
    which keep the activations of the most micro-batches.

    Args:
        layers: cost of each layer.
        before, after: costs of the first and the last stage in addition to their layers.

    Raises:
        ConfigError: fewer layers than stages.
    """
    if len(layers) < stages:
        raise ConfigError(f"{len(layers)} layers are too few for {stages} pipeline stages: choose fewer stages")

    def stage_cost(stage: int, start: int, end: int) -> float:
        return sum(layers[start:end]) + before * (stage == 0) + after * (stage == stages - 1)

    def best(merge, limit: float) -> tuple[float, list[int]]:
        """Least merged cost of the stages after each layer, from the last stage back to the first."""
        rest: dict[int, tuple[float, list[int]]] = {len(layers): (0.0, [])}
        for stage in reversed(range(stages)):
            here = {}
            for start in range(stage, len(layers) - (stages - stage) + 1):
                options = [
                    (merge(cost, rest[end][0]), [end - start, *rest[end][1]])
                    for end in range(start + 1, len(layers) + 1)
                    if end in rest and (cost := stage_cost(stage, start, end)) <= limit
                ]
                if options:
                    here[start] = min(options)
            rest = here
        return rest[0]

    slowest, _ = best(max, limit=float("inf"))
    _, counts = best(lambda cost, others: cost**2 + others, limit=slowest)
    return counts


def layout_string(counts: Sequence[int]) -> str:
    """The split in Megatron's letters: E embeddings, t a layer, L the head and the loss, | the end of a stage."""
    return "E" + "|".join("t" * count for count in counts) + "L"


def layer_counts(layout: str, num_layers: int, ranks: int) -> list[int]:
    """Layers of each stage of a layout string.

    Raises:
        ConfigError: it does not fit the model or the number of ranks.
    """
    where = f"--pipeline-model-parallel-layout {layout}"
    if not re.fullmatch(r"[EtL|,()*\d]+", layout):
        raise ConfigError(f"{where}: write E for the embeddings, t for a layer, L for the head, | between stages")
    stages = layout_stages(layout)
    counts = [stage.count("t") for stage in stages]
    if "".join(stages) != "E" + "t" * sum(counts) + "L":
        raise ConfigError(f"{where}: it must begin with one E, end with one L and have only layers between them")
    if sum(counts) != num_layers:
        raise ConfigError(f"{where}: it has {sum(counts)} layers, the model has {num_layers}")
    if len(counts) % ranks:
        raise ConfigError(
            f"{where}: its {len(counts)} stages are not a multiple of --pipeline-model-parallel-size {ranks}"
        )
    return counts


def describe(counts: Sequence[int], costs: Costs, ranks: int) -> str:
    """A table of the stages: their layers, what else they hold, and their share of the work of a training step."""
    shares = [cost / sum(costs.stages(counts)) for cost in costs.stages(counts)]
    lines = ["pipeline stage   layers   share of the work"]
    for number, (count, share) in enumerate(zip(counts, shares, strict=True)):
        name = f"{number % ranks}" + (f", chunk {number // ranks}" if len(counts) > ranks else "")
        first = sum(counts[:number])
        layers = f"{first}-{first + count - 1}" if count else "-"
        extra = " with embeddings" * (number == 0) + " with head" * (number == len(counts) - 1)
        lines.append(f"{name:<14}{layers:>9}   {share:7.1%}{extra}")
    lines.append(f"the slowest rank has {slowest_rank(counts, costs, ranks):.3f} times the mean work")
    return "\n".join(lines)


def slowest_rank(counts: Sequence[int], costs: Costs, ranks: int) -> float:
    """Work of the rank that has most, over the mean; a rank has every `ranks`-th stage."""
    stages = costs.stages(counts)
    of_rank = [sum(stages[rank::ranks]) for rank in range(ranks)]
    return max(of_rank) * ranks / sum(of_rank)


def _advice(even: Sequence[int], best: Sequence[int], costs: Costs, ranks: int) -> str:
    """Recommends the split from costs if it beats Megatron's even one by more than the costs' inaccuracy."""
    before, after = (slowest_rank(counts, costs, ranks) for counts in (even, best))
    if before < 1.02 * after:
        return ""
    return f"\n{after:.3f} times with --pipeline-model-parallel-layout '{layout_string(best)}'"
