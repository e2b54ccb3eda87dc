"""The forms of native attention, as data: where the channels for t, h and w of a query or key head come from.

    separate   h and w have projections of their own next to Qwen3's, and queries and keys are 2D wide:
               t D, h D/2, w D/2, each with a norm. NEO 1.0 (arXiv 2510.14979, section 3.1) and NEO-ov.
    in-head    the D channels that Qwen3 has are shared out: t D/2, h D/4, w D/4; one norm for t, one for h and w
               together. SenseNova-U1 (arXiv 2605.12500, section 3.2).

D is the width of a value head; scores are divided by sqrt(D) in both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionForm:
    """One form.

    Args:
        query_key_widths: width of a query or key head in multiples of D.
        products: projections of the hidden states, one of which makes the values too.
        norms: of a query or key head.
        trained_in_stage_1: Megatron's names, within a layer, of the modules and parameters of a post-LLM layer that
            stage 1 trains.
    """

    query_key_widths: int
    products: int
    norms: int
    trained_in_stage_1: tuple[str, ...]


FORMS = {
    # All that is new to the post-LLM.
    "separate": AttentionForm(
        query_key_widths=2,
        products=2,
        norms=3,
        trained_in_stage_1=(
            "self_attention.linear_qk_hw",
            "self_attention.q_layernorm_h",
            "self_attention.q_layernorm_w",
            "self_attention.k_layernorm_h",
            "self_attention.k_layernorm_w",
        ),
    ),
    # Nothing is new, but queries and keys mean something else: as published, the projections of the attention and the
    # norms of queries and keys (arXiv 2605.12500, section 3.4).
    "in-head": AttentionForm(
        query_key_widths=1,
        products=1,
        norms=2,
        trained_in_stage_1=(
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
            "self_attention.q_layernorm",
            "self_attention.q_layernorm_hw",
            "self_attention.k_layernorm",
            "self_attention.k_layernorm_hw",
        ),
    ),
}
