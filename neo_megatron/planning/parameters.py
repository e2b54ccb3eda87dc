"""The parameters that a rank holds, in the order of the modules: buffers are padded by that order.

It must follow `NeoModel`; `tests/planning/test_state.py` holds both against each other to the byte.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

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
    """The same, from what of the layout decides it: a search asks for few of these many times."""
    frozen = trains_new_parts_only(training_stage)
    hidden, width, tied = sizes.hidden_size, sizes.patch_embedding_size, sizes.tie_word_embeddings
    vocabulary = Parameter(sizes.vocab_size // tensor * hidden, trained=not frozen, shared_embedding=tied and pipelined)
    parameters: list[Parameter] = []
    if chunk.embedding:
        patch = (3 * sizes.patch_size**2 * width, width, sizes.merge_size**2 * width * hidden, hidden)
        parameters += [vocabulary, *(Parameter(elements, trained=True) for elements in patch)]
    for number in range(chunk.first_layer, chunk.first_layer + chunk.layers):
        parameters += _layer(sizes, tensor, frozen and number >= sizes.pre_buffer_layers)
    if chunk.head:
        parameters.append(Parameter(hidden, trained=not frozen))
        # In one chunk a tied head is the embedding itself; on two it is a copy.
        if not (tied and chunk.embedding):
            parameters.append(vocabulary)
    return tuple(parameters)


def _layer(sizes: NeoSizes, tensor: int, frozen: bool) -> Iterator[Parameter]:
    hidden, head, ffn = sizes.hidden_size, sizes.head_dim, sizes.ffn_hidden_size
    heads, groups = sizes.num_attention_heads, sizes.num_query_groups

    def matrix(elements: int, new: bool = False) -> Parameter:
        return Parameter(elements // tensor, trained=new or not frozen, matrix_of_layer=True)

    def norm(elements: int, new: bool = False) -> Parameter:
        return Parameter(elements, trained=new or not frozen)

    yield norm(hidden)
    yield matrix((heads + 2 * groups) * head * hidden)
    yield matrix((heads + groups) * head * hidden, new=True)
    yield matrix(heads * head * hidden)
    yield from (norm(head), norm(head))
    yield from (norm(head // 2, new=True) for _ in range(4))
    yield norm(hidden)
    yield matrix(2 * ffn * hidden)
    yield matrix(ffn * hidden)
