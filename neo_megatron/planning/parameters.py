"""The parameters that a rank holds, in the order of the modules: buffers are padded by that order.

They come from the table of tensors; `tests/planning/test_state.py` compares them with `NeoModel` to the byte.
"""

import math
from dataclasses import dataclass
from functools import cache

from neo_megatron.checkpoint.names import WORD_EMBEDDING, TensorRow, tensor_table
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.flops import trains_new_parts_only
from neo_megatron.planning.layout import Chunk, Layout


@dataclass(frozen=True)
class Parameter:
    """One tensor: its elements on this rank, whether it trains, whether it is one of two copies of a tied embedding."""

    elements: int
    trained: bool
    shared_embedding: bool = False
    matrix_of_layer: bool = False
    """A matrix of a decoder layer: what FP8 keeps a second form of."""


def chunk_parameters(sizes: NeoSizes, layout: Layout, chunk: Chunk, training_stage: int) -> tuple[Parameter, ...]:
    """The parameters of one chunk on one tensor-parallel rank."""
    pipelined = layout.pipeline_model_parallel_size > 1
    return parameters_of(sizes, chunk, training_stage, layout.tensor_model_parallel_size, pipelined)


@cache
def parameters_of(
    sizes: NeoSizes, chunk: Chunk, training_stage: int, tensor: int, pipelined: bool
) -> tuple[Parameter, ...]:
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
    shared = {WORD_EMBEDDING} if sizes.tie_word_embeddings and pipelined else set()
    return tuple(
        Parameter(
            elements=math.prod(row.megatron_shape) // (1 if row.tensor_parallel_dim is None else tensor),
            trained=row.trained_in_stage_1 or not frozen,
            shared_embedding=not shared.isdisjoint(row.hf),
            matrix_of_layer=row.layer is not None and len(row.megatron_shape) == 2,
        )
        for row in wanted
    )


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
