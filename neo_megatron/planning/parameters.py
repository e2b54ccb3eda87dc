"""The parameters that a rank holds, in the order of the modules: buffers are padded by that order.

They come from the table of tensors; `tests/planning/test_state.py` compares them with `NeoModel` to the byte.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import batched, groupby

from neo_megatron.checkpoint.names import LM_HEAD, WORD_EMBEDDING, TensorRow, tensor_table
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.flops import ROUTER, trains_new_parts_only
from neo_megatron.planning.layout import Chunk, Layout


@dataclass(frozen=True)
class Parameter:
    """Tensors of one size, one after another.

    Args:
        elements: of one of them on this rank.
        trained: whether they train.
        count: how many they are.
        shared_embedding: it is one of two copies of a tied embedding.
        quantized: FP8 keeps a second form: matrices of a decoder layer, but for the router.
        expert: they belong to experts.
        matrix: Muon updates them.
    """

    elements: int
    trained: bool
    count: int = 1
    shared_embedding: bool = False
    quantized: bool = False
    expert: bool = False
    matrix: bool = False

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.count * self.elements


@dataclass(frozen=True)
class Division:
    """The parts of a layout that decide which parameters a rank holds.

    Args:
        tensor: ranks that share a matrix.
        pipelined: whether there are several pipeline stages.
        experts, expert_tensor: ranks that experts are dealt to, and ranks that share a matrix of an expert.
        grouped: experts lie as in Transformer Engine, all first matrices before all second ones; else expert by expert.
    """

    tensor: int
    pipelined: bool
    experts: int
    expert_tensor: int
    grouped: bool

    @classmethod
    def of(cls, layout: Layout) -> "Division":
        return cls(
            tensor=layout.tensor_model_parallel_size,
            pipelined=layout.pipeline_model_parallel_size > 1,
            experts=layout.expert_model_parallel_size,
            expert_tensor=layout.expert_tensor_ranks,
            grouped=layout.transformer_impl == "transformer_engine",
        )


def chunk_parameters(sizes: NeoSizes, layout: Layout, chunk: Chunk, training_stage: int) -> tuple[Parameter, ...]:
    """The parameters of one chunk on one rank."""
    return parameters_of(sizes, chunk, training_stage, Division.of(layout))


@cache
def parameters_of(sizes: NeoSizes, chunk: Chunk, training_stage: int, division: Division) -> tuple[Parameter, ...]:
    """The same from the parts of the layout that decide it; cached, because a search needs few of them many times."""
    frozen = trains_new_parts_only(training_stage)
    stem, layers, head = _rows(sizes)
    wanted: list[TensorRow] = [*stem] if chunk.embedding else []
    for number in range(chunk.first_layer, chunk.first_layer + chunk.layers):
        wanted += layers[number]
    if chunk.head:
        wanted += head
        if sizes.tie_word_embeddings and not chunk.embedding:
            wanted.append(stem[0])  # in one chunk a tied head is the embedding itself; on two it is a copy
    shared = {WORD_EMBEDDING} if sizes.tie_word_embeddings and division.pipelined else set()
    parameters: list[Parameter] = []
    for row in wanted:
        trained = row.trained_in_stage_1 or not frozen
        if row.expert:
            experts, *shape = row.megatron_shape
            elements = math.prod(shape) // division.expert_tensor
            parameters.append(
                Parameter(
                    elements,
                    trained,
                    count=experts // division.experts,
                    quantized=True,
                    expert=True,
                    matrix=True,
                )
            )
            continue
        parameters.append(
            Parameter(
                elements=math.prod(row.megatron_shape) // (1 if row.tensor_parallel_dim is None else division.tensor),
                trained=trained,
                shared_embedding=not shared.isdisjoint(row.hf),
                quantized=row.layer is not None and len(row.megatron_shape) == 2 and not row.megatron.endswith(ROUTER),
                matrix=len(row.megatron_shape) == 2 and {WORD_EMBEDDING, LM_HEAD}.isdisjoint(row.hf),
            )
        )
    return tuple(parameters if division.grouped else _expert_by_expert(parameters))


def _expert_by_expert(parameters: list[Parameter]) -> Iterator[Parameter]:
    """The two matrices of each expert in turn."""
    for expert, run in groupby(parameters, key=lambda parameter: parameter.expert):
        if not expert:
            yield from run
            continue
        for first, second in batched(run, 2):
            yield from (replace(first, count=1), replace(second, count=1)) * first.count


@cache
def _rows(sizes: NeoSizes) -> tuple[list[TensorRow], list[list[TensorRow]], list[TensorRow]]:
    """The table's rows before, in and after the layers."""
    table = tensor_table(sizes)
    layers: list[list[TensorRow]] = [[] for _ in range(sizes.num_layers)]
    for row in table:
        if row.layer is not None:
            layers[row.layer].append(row)
    outside = [row for row in table if row.layer is None]
    number_of_stem = next(number for number, row in enumerate(table) if row.layer is not None)
    return outside[:number_of_stem], layers, outside[number_of_stem:]
