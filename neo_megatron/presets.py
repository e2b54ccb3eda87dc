"""Presets: named sizes of the released models and of others, and recipes: hyperparameters of the training stages."""

from dataclasses import dataclass
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

_KIT_ADAMW = dict(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0)
_PAPER_ADAMW = dict(adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, weight_decay=0.01)
_COSINE = dict(lr_decay_style="cosine")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training stages.

    Args:
        source: where the numbers come from, for people.
        stages: training stage -> arguments of Megatron. Only numbers that the source states: `min_lr` is absent if it
            does not say how low the rate falls. A warm-up is a fraction of the training, or a number of steps.
    """

    source: str
    stages: dict[int, dict[str, Any]]


RECIPES = {
    # AdamW: the defaults of `neo/train/argument.py`. Warm-up and lowest rates: the scripts of its stages, but for the
    # warm-up of stage 1, which is the paper's share (section 4.1); the script has 1,000 of 200,000 steps. Peak rates:
    # the paper's; the scripts have 5e-5 in stage 2 and 6e-5 in stage 3.
    "kit": Recipe(
        "AdamW and schedule of the public kit, at the peak rates of the paper",
        {
            1: dict(lr=8e-4, min_lr=8e-5, lr_warmup_fraction=0.01, **_COSINE, **_KIT_ADAMW),
            2: dict(lr=4e-5, min_lr=8e-6, lr_warmup_fraction=0.03, **_COSINE, **_KIT_ADAMW),
            3: dict(lr=5e-5, min_lr=5e-6, lr_warmup_fraction=0.03, **_COSINE, **_KIT_ADAMW),
        },
    ),
    # Table 5. Its SFT has no lowest rate: a cosine to zero. It does not mention clipping.
    "paper": Recipe(
        "NEO's paper, arXiv 2510.14979 v2, table 5",
        {
            1: dict(lr=8e-4, min_lr=4e-5, lr_warmup_iters=2000, **_COSINE, **_PAPER_ADAMW),
            2: dict(lr=4e-5, min_lr=4e-6, lr_warmup_iters=200, **_COSINE, **_PAPER_ADAMW),
            3: dict(lr=5e-5, min_lr=0.0, lr_warmup_iters=200, **_COSINE, **_PAPER_ADAMW),
        },
    ),
    # Section 4.1. It says AdamW without constants, and a cosine without the rate that it falls to.
    "neo-ov": Recipe(
        "NEO-ov's paper, arXiv 2605.28820, section 4.1",
        {
            1: dict(lr=2e-4, lr_warmup_fraction=0.01, **_COSINE),
            2: dict(lr=5e-5, lr_warmup_fraction=0.01, **_COSINE),
            3: dict(lr=5e-5, lr_warmup_fraction=0.01, **_COSINE),
        },
    ),
}
DEFAULT_RECIPE = "kit"
# Sizes whose own recipe is another.
RECIPE_OF_SIZE = {"neo-ov-2b": "neo-ov", "neo-ov-9b": "neo-ov"}
