"""Traffic, memory and requirements of both ways of context parallelism, per layer and rank; the planner uses it too.

With t tokens of a micro-batch on a rank, n query and g key-value heads of its tensor-parallel part and c
context-parallel ranks, where queries and keys are x wide and values and the output d, a rank sends

                 forward                            backward
    a2a          t (x + d) (n + g) (c - 1) / c      the same: gradients go back the way the values came
    allgather    t (x + d) g (c - 1)                twice that: keys and values once more, which are not kept, and
                                                    gradients

elements. An all-to-all carries queries and output too (x + d wide, n heads), but each element once, less the c-th part
that stays; a gather carries keys and values only (x + d wide, g heads), but to c - 1 ranks. Over a step a2a sends less
where c > 2/3 (1 + n / g): at c = 2 it draws for NEO-2B (n / g = 2), from c = 4 on it wins for NEO-9B (n / g = 4). Its
work is even by itself, so it also takes a draw; but it needs g to be a multiple of c.
"""

from typing import Literal

Way = Literal["a2a", "allgather"]
WAYS: tuple[Way, ...] = ("a2a", "allgather")


def sent_bytes(
    way: Way,
    tokens: int,
    query_heads: int,
    key_value_heads: int,
    widths: tuple[int, int],
    ranks: int,
    element_size: int = 2,
) -> tuple[int, int]:
    """Bytes a rank sends (and receives) in one layer: forward, backward. A recomputed forward counts again.

    Args:
        tokens: of a micro-batch, held by this rank: packs * T / ranks.
        query_heads, key_value_heads: of this tensor-parallel rank.
        widths: channels of a query or key head, and of a value head.
    """
    token = sum(widths) * element_size
    if way == "a2a":
        forward = tokens * token * (query_heads + key_value_heads) * (ranks - 1) // ranks
        return forward, forward
    forward = tokens * token * key_value_heads * (ranks - 1)
    return forward, 2 * forward


def saved_bytes(
    tokens: int, query_heads: int, key_value_heads: int, widths: tuple[int, int], element_size: int = 2
) -> int:
    """Bytes of queries, keys, values and output kept for the backward of one layer: alike without and in both ways.

    Under a2a they are complete packs for 1 / c of the heads, under allgather 1 / c of the packs for all heads. The
    kernel's own float32 log-sum-exp (4 bytes a token and query head) comes on top.
    """
    return tokens * sum(widths) * element_size * (query_heads + key_value_heads)


def buffer_bytes(
    way: Way,
    tokens: int,
    query_heads: int,
    key_value_heads: int,
    widths: tuple[int, int],
    ranks: int,
    element_size: int = 2,
) -> tuple[int, int]:
    """Bytes on top of `saved_bytes` at the worst moment of one layer: forward, backward. Gone when the layer is done.

    a2a: queries, keys and values as projected and as packed to be sent (forward); their gradients before and after
    (backward). allgather: keys and values of complete packs, as they arrive and in the order of the packs (forward); in
    the order of the packs, next to their gradients as the kernel gives them and joined to be sent (backward).
    """
    key_value = key_value_heads * sum(widths)
    if way == "a2a":
        packed = tokens * element_size * (query_heads * widths[0] + key_value)
        return 2 * packed, 2 * packed
    gathered = tokens * ranks * element_size * key_value
    return 2 * gathered, 3 * gathered


def default_way(query_heads: int, key_value_heads: int, ranks: int) -> Way:
    """The way that sends less over forward and backward, of those that the heads of a tensor-parallel rank allow."""
    possible = WAYS if key_value_heads % ranks == 0 else ("allgather",)
    return min(possible, key=lambda way: sum(sent_bytes(way, ranks, query_heads, key_value_heads, (1, 1), ranks)))
