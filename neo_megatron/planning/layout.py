"""The parallel layout of a run, under Megatron's names, and the layers that each pipeline stage holds."""

import re
from argparse import Namespace
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from typing import Literal

from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.context_parallel_cost import Way
from neo_megatron.validation.fp8 import check_fp8
from neo_megatron.validation.fully_sharded import fully_sharded_refusals
from neo_megatron.validation.recomputation import recomputation_refusals

Precision = Literal["bf16", "fp8", "fp32"]


def precision_of(args: Namespace) -> Precision:
    """Precision of a run's matrix products, from Megatron's arguments; fp16 has the rate of bf16."""
    return "fp8" if args.fp8 else "bf16" if args.bf16 or args.fp16 else "fp32"


def mlp_module(experts: bool) -> str:
    """Name in --recompute-modules of what a layer has after its attention."""
    return "moe" if experts else "mlp"


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one pipeline rank: one virtual stage, or all of a rank where there are none."""

    first_layer: int
    layers: int
    embedding: bool
    head: bool

    def pre_buffer_layers(self, sizes: NeoSizes) -> int:
        return min(max(sizes.pre_buffer_layers - self.first_layer, 0), self.layers)


@dataclass(frozen=True)
class Layout:
    """Sizes and switches of Megatron that decide what a rank holds, computes and sends."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    pipeline_model_parallel_layout: str | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """`None` is Megatron's default, the tensor-parallel size."""
    cp_comm_type: Way | None = None
    data_parallel_size: int = 1
    micro_batch_size: int = 1
    global_batch_size: int = 1
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    optimizer: Literal["adam", "muon", "sgd"] = "adam"
    """SGD is planned as AdamW, which keeps more."""
    use_megatron_fsdp: bool = False
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = (
        "optim_grads_params"
    )
    suggested_communication_unit_size: int = 10**9
    """Elements; Megatron's default."""
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int = 1
    recompute_modules: tuple[str, ...] = ("core_attn",)
    precision: Precision = "bf16"
    fp8_param_gather: bool = False
    transformer_impl: Literal["local", "transformer_engine"] = "transformer_engine"
    attention_backend: Literal["auto", "flash"] = "auto"
    """`unfused` is planned as `auto`, see `run.dry_run`."""

    @classmethod
    def from_arguments(cls, args: Namespace, precision: Precision) -> "Layout":
        """From Megatron's arguments, of which `world_size` is the number of GPUs.

        Raises:
            ConfigError: the number of GPUs or the global batch cannot be divided.
        """
        taken = {
            field.name: getattr(args, field.name)
            for field in fields(cls)
            if getattr(args, field.name, None) is not None
            and field.name not in ("recompute_modules", "attention_backend")
        }
        if getattr(args, "use_layer_wise_distributed_optimizer", False):  # Megatron's name of it for Muon
            taken["use_distributed_optimizer"] = True
        if getattr(args.attention_backend, "name", args.attention_backend) == "flash":  # Megatron's is an enum
            taken["attention_backend"] = "flash"
        if isinstance(args.cp_comm_type, list):  # Megatron allows one per layer
            taken["cp_comm_type"] = args.cp_comm_type[0]
        if args.recompute_modules:
            taken["recompute_modules"] = tuple(args.recompute_modules)
        if taken.get("expert_tensor_parallel_size") == args.tensor_model_parallel_size:
            del taken["expert_tensor_parallel_size"]  # Megatron has written its default
        layout = cls(**taken | {"precision": precision, "data_parallel_size": 1})
        virtual = layout.virtual_pipeline_model_parallel_size
        if layout.pipeline_model_parallel_layout is not None:
            stages = len(layout_stages(layout.pipeline_model_parallel_layout))
            virtual = stages // layout.pipeline_model_parallel_size
        elif args.num_virtual_stages_per_pipeline_rank:
            virtual = args.num_virtual_stages_per_pipeline_rank
        elif args.num_layers_per_virtual_pipeline_stage:
            layers = args.num_layers // layout.pipeline_model_parallel_size
            virtual = layers // args.num_layers_per_virtual_pipeline_stage
        data, rest = divmod(args.world_size, layout.model_ranks)
        if rest or not data:
            raise ConfigError(
                f"TP {layout.tensor_model_parallel_size} x PP {layout.pipeline_model_parallel_size} x "
                f"CP {layout.context_parallel_size} is {layout.model_ranks} GPUs, and {args.world_size} is not a "
                "multiple of that: choose other sizes"
            )
        if layout.global_batch_size % (layout.micro_batch_size * data):
            raise ConfigError(
                f"--global-batch-size {layout.global_batch_size} is not a multiple of --micro-batch-size "
                f"{layout.micro_batch_size} times the {data} data-parallel ranks: choose one that is"
            )
        return replace(layout, data_parallel_size=data, virtual_pipeline_model_parallel_size=virtual)

    @property
    def world_size(self) -> int:
        return self.model_ranks * self.data_parallel_size

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one copy of the model and work on one micro-batch."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def state_ranks(self) -> int:
        """Ranks that hold the same parameters: gradients are reduced, and optimizer state divided, over them."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def shards_gradients(self) -> bool:
        """Whether gradients of every micro-batch are reduced to shards (ZeRO-2 and 3)."""
        return self.use_megatron_fsdp and self.data_parallel_sharding_strategy in ("optim_grads", "optim_grads_params")

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters are gathered for each layer, in forward and backward (ZeRO-3)."""
        return self.use_megatron_fsdp and self.data_parallel_sharding_strategy == "optim_grads_params"

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks that share each matrix of an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_state_ranks(self) -> int:
        """Ranks that hold the same experts, as `state_ranks` for all other parameters."""
        ranks = self.tensor_model_parallel_size * self.state_ranks
        return ranks // (self.expert_model_parallel_size * self.expert_tensor_ranks)

    @property
    def experts_apart(self) -> bool:
        """Whether gradients of experts are reduced over ranks of their own, in buffers of their own."""
        return self.expert_model_parallel_size > 1 or self.expert_tensor_ranks != self.tensor_model_parallel_size

    @cached_property
    def of_state(self) -> "Layout":
        """The sizes and switches that decide which state a rank holds; all others have their defaults."""
        return Layout(**{name: getattr(self, name) for name in _OF_STATE})

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def sequence_ranks(self) -> int:
        """Ranks that the parts of a layer outside the tensor-parallel products are divided over."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    @property
    def fp8_recipe(self) -> str:
        """Megatron's default, unless something conflicts with it."""
        delayed = not (self.fp8_param_gather or self.recomputes("layernorm") or self.recomputes("mlp_act"))
        return "delayed" if delayed else "tensorwise"

    @property
    def parameter_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def refusal(self, sizes: NeoSizes, sequence_length: int, training_stage: int = 2) -> str | None:
        """Why this layout cannot work, as far as it is known without Megatron; see also `validation.parallelism`."""
        tensor, context = self.tensor_model_parallel_size, self.context_parallel_size
        for what, count in (
            ("query heads", sizes.num_attention_heads),
            ("key-value heads", sizes.num_query_groups),
            ("vocabulary rows", sizes.vocab_size),
            ("channels of --ffn-hidden-size", sizes.ffn_hidden_size),
        ):
            if count % tensor:
                return (
                    f"--tensor-model-parallel-size {tensor} does not divide the {count} {what} of this model: "
                    "choose a size that does"
                )
        if self.recompute_granularity == "selective":
            fp8_recipe = self.fp8_recipe if self.precision == "fp8" else None
            rules = recomputation_refusals(self.recompute_modules, bool(sizes.num_experts), context, fp8_recipe)
            for refusal in rules:
                return refusal
        if self.optimizer == "muon" and (self.use_megatron_fsdp or self.precision == "fp8"):
            what = "--use-megatron-fsdp" if self.use_megatron_fsdp else "FP8"
            return f"{what} is not for --optimizer muon: leave one of them out"
        if self.use_megatron_fsdp:
            for refusal in fully_sharded_refusals(
                *(self.data_parallel_sharding_strategy, self.pipeline_model_parallel_size, tensor),
                *(bool(sizes.num_experts), self.precision == "fp8"),
            ):
                return refusal
        if refusal := self._refusal_of_experts(sizes):
            return refusal
        if self.sequence_parallel and tensor == 1:
            return "--sequence-parallel shares sequences out to tensor-parallel ranks: add --tensor-model-parallel-size"
        if sequence_length % (2 * context if context > 1 else 1) or sequence_length % (context * self.sequence_ranks):
            return (
                f"--seq-length {sequence_length} cannot be divided over --context-parallel-size {context} and "
                f"{self.sequence_ranks} sequence-parallel ranks: pack again, or choose other sizes"
            )
        if self.cp_comm_type == "a2a" and sizes.num_query_groups // tensor % context:
            return (
                f"--cp-comm-type a2a with --context-parallel-size {context}: a tensor-parallel rank's "
                f"{sizes.num_query_groups // tensor} key-value heads cannot be divided evenly; choose allgather"
            )
        virtual, pipeline = self.virtual_pipeline_model_parallel_size, self.pipeline_model_parallel_size
        if virtual > 1 and (pipeline == 1 or self.micro_batches % pipeline):
            return (
                f"{virtual} virtual stages need a pipeline, and micro-batches in multiples of its {pipeline} ranks, "
                f"not {self.micro_batches}: choose another --global-batch-size"
            )
        if self.fp8_param_gather and self.precision != "fp8":
            return "--fp8-param-gather is for FP8: choose --precision fp8, or leave it out"
        if self.precision == "fp8":
            return next(check_fp8(self._fp8_arguments(sizes, sequence_length, training_stage)), None)
        return None

    def _refusal_of_experts(self, sizes: NeoSizes) -> str | None:
        size, tensor = self.expert_model_parallel_size, self.expert_tensor_ranks
        if not sizes.num_experts:
            given = "model" if size > 1 else "tensor" if self.expert_tensor_parallel_size else None
            return given and f"--expert-{given}-parallel-size is for a --neo-model with experts: leave it out"
        if sizes.num_experts % size:
            return (
                f"--expert-model-parallel-size {size} does not divide the {sizes.num_experts} experts: choose a size "
                "that does"
            )
        ranks = self.tensor_model_parallel_size * self.state_ranks
        if ranks % (size * tensor):
            return (
                f"--expert-model-parallel-size {size} with {tensor} tensor-parallel ranks of an expert does not divide "
                f"the {ranks} ranks of a pipeline stage: choose a smaller size, or --expert-tensor-parallel-size 1"
            )
        if sizes.expert_ffn_hidden_size % tensor:
            return (
                f"--expert-tensor-parallel-size {tensor} does not divide the {sizes.expert_ffn_hidden_size} channels "
                "of an expert: choose a size that does, such as 1"
            )
        if self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            return "a mixture of experts with --tensor-model-parallel-size needs --sequence-parallel: add it"
        return None

    def _fp8_arguments(self, sizes: NeoSizes, sequence_length: int, training_stage: int) -> Namespace:
        """The settings that `check_fp8` reads, under Megatron's names."""
        return Namespace(
            **vars(self),
            fp8="hybrid",
            bf16=True,
            fp8_recipe=self.fp8_recipe,
            first_last_layers_bf16=False,
            eval_micro_batch_size=None,
            seq_length=sequence_length,
            training_stage=training_stage,
            num_attention_heads=sizes.num_attention_heads,
            num_query_groups=sizes.num_query_groups,
            hidden_size=sizes.hidden_size,
            ffn_hidden_size=sizes.ffn_hidden_size,
            kv_channels=sizes.head_dim,
            neo_sizes=asdict(sizes),
        )

    def recomputes(self, module: str) -> bool:
        """Whether a module of every layer is recomputed on its own."""
        return self.recompute_granularity == "selective" and module in self.recompute_modules

    @property
    def recomputes_mlp(self) -> bool:
        """Whether the SwiGLU of every layer, or its router and experts, is recomputed on its own."""
        return self.recomputes("mlp") or self.recomputes("moe")

    def recomputed_layers(self, numbers: range) -> int:
        """How many of these layers, numbered within their chunk, are fully recomputed."""
        if self.recompute_granularity != "full":
            return 0
        if self.recompute_method == "uniform":
            return len(numbers)
        return len(range(numbers.start, min(numbers.stop, self.recompute_num_layers)))

    def checkpoints(self, layers: int) -> int:
        """Hidden states that full recomputation of a chunk of so many layers keeps."""
        if self.recompute_method == "uniform":
            return -(-layers // self.recompute_num_layers)
        return min(self.recompute_num_layers, layers)

    def chunks(self, sizes: NeoSizes) -> list[list[Chunk]]:
        """The chunks of every pipeline rank, ``[pipeline][virtual]``.

        Raises:
            ConfigError: the layers cannot be divided like this.
        """
        return _chunks(
            sizes.num_layers,
            self.pipeline_model_parallel_size,
            self.virtual_pipeline_model_parallel_size,
            self.pipeline_model_parallel_layout,
        )

    def alike_chunks(self, sizes: NeoSizes) -> list[tuple[Chunk, ...]]:
        """As `chunks`; those that hold, compute and send the same are equal, however their layers are numbered."""
        return _alike_chunks(
            sizes.pre_buffer_layers,
            sizes.num_layers,
            self.pipeline_model_parallel_size,
            self.virtual_pipeline_model_parallel_size,
            self.pipeline_model_parallel_layout,
        )


_OF_STATE = (
    *("tensor_model_parallel_size", "context_parallel_size", "data_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"),
    *("use_distributed_optimizer", "overlap_grad_reduce", "precision", "transformer_impl", "optimizer"),
    *("use_megatron_fsdp", "data_parallel_sharding_strategy", "suggested_communication_unit_size"),
)


@cache
def _alike_chunks(
    pre_buffer: int, num_layers: int, ranks: int, virtual: int, layout: str | None
) -> list[tuple[Chunk, ...]]:
    def alike(chunk: Chunk) -> Chunk:
        if chunk.first_layer + chunk.layers <= pre_buffer:
            return replace(chunk, first_layer=0)
        return replace(chunk, first_layer=min(chunk.first_layer, pre_buffer, num_layers - chunk.layers))

    return [tuple(map(alike, chunks)) for chunks in _chunks(num_layers, ranks, virtual, layout)]


@cache
def _chunks(num_layers: int, ranks: int, virtual: int, layout: str | None) -> list[list[Chunk]]:
    if layout is not None:
        stages = layout_stages(layout)
    else:
        count, rest = divmod(num_layers, ranks * virtual)
        if rest:
            raise ConfigError(
                f"--pipeline-model-parallel-size {ranks} with {virtual} virtual stages does not divide the "
                f"{num_layers} layers: choose sizes that do, --pre-buffer-pipeline-stages or "
                "--pipeline-model-parallel-layout"
            )
        stages = ["t" * count] * (ranks * virtual)
        stages[0] = "E" + stages[0]
        stages[-1] += "L"
    if len(stages) != ranks * virtual or "".join(stages) != "E" + "t" * num_layers + "L":
        raise ConfigError(
            f"--pipeline-model-parallel-layout {layout}: needs {ranks * virtual} "
            f"stages with the embeddings E, {num_layers} layers t and the head L, in this order"
        )
    first, chunks = 0, []
    for stage in stages:
        chunks.append(Chunk(first, stage.count("t"), "E" in stage, "L" in stage))
        first += stage.count("t")
    return [chunks[rank::ranks] for rank in range(ranks)]


def layout_stages(layout: str) -> list[str]:
    """The stages of Megatron's layout string, products written out: ``Et*2|(tt|)*2L`` -> Ett, tt, tt, L."""
    layout = layout.replace(",", "")
    for product in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(product, lambda match: match.group(1) * int(match.group(2)), layout)
    return layout.split("|")
