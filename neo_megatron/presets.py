"""Presets: named sizes of the released models and of others, and the hyperparameters of the training stages.

The stages are the same for every size.
"""

from typing import Any

from neo_megatron.model.config import NeoSizes

# Qwen3-1.7B-Base after 12 pre-buffer layers, and Qwen3-8B-Base after 6.
_2B = NeoSizes(
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=128,
    pre_buffer_layers=12,
    post_llm_layers=28,
    vocab_size=151936,
    tie_word_embeddings=True,
    patch_embedding_size=1024,
)
_9B = NeoSizes(
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    pre_buffer_layers=6,
    post_llm_layers=36,
    vocab_size=151936,
    tie_word_embeddings=False,
    patch_embedding_size=1024,
)
# Pixel limits of the published evaluation of NEO-ov.
_OV = dict(min_pixels=1280 * 32**2, max_pixels=16384 * 32**2)

PUBLISHED_SIZES = {
    # NEO 1.0 (arXiv 2510.14979).
    "neo-2b": _2B,
    "neo-9b": _9B,
    # NEO-ov (arXiv 2605.28820): the same models, trained on.
    "neo-ov-2b": _2B.replace(**_OV),
    "neo-ov-9b": _9B.replace(**_OV),
    # The understanding branch of SenseNova-U1 and U1.5 (arXiv 2605.12500), dense.
    "u1-8b": _9B.replace(
        attention_form="in-head", rope_theta=5e6, max_positions=262144, min_pixels=65536, max_pixels=16777216
    ),
    # The same with experts; it has no pre-buffer.
    "u1-a3b": NeoSizes(
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        pre_buffer_layers=0,
        post_llm_layers=48,
        vocab_size=151936,
        tie_word_embeddings=False,
        patch_embedding_size=1024,
        rope_theta=1e7,
        max_positions=262144,
        min_pixels=65536,
        max_pixels=16777216,
        attention_form="in-head",
        num_experts=128,
        experts_per_token=8,
        expert_ffn_hidden_size=768,
    ),
}

SIZES = {
    **PUBLISHED_SIZES,
    # Small enough to learn the quickstart on two CPU cores.
    "tiny": NeoSizes(
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=2,
        num_query_groups=2,
        head_dim=32,
        pre_buffer_layers=2,
        post_llm_layers=2,
        vocab_size=512,
        tie_word_embeddings=False,
        patch_embedding_size=64,
    ),
}

_ADAMW = dict(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0)
_COSINE = dict(lr_decay_style="cosine")

# Learning rates and schedules of the paper (arXiv 2510.14979, table 1).
STAGES: dict[int, dict[str, Any]] = {
    1: dict(lr=8e-4, min_lr=8e-5, lr_warmup_fraction=0.01, **_COSINE, **_ADAMW),
    2: dict(lr=4e-5, min_lr=8e-6, lr_warmup_fraction=0.03, **_COSINE, **_ADAMW),
    3: dict(lr=5e-5, min_lr=5e-6, lr_warmup_fraction=0.03, **_COSINE, **_ADAMW),
}
