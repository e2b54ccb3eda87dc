"""The sizes of the released models, NEO 1.0."""

from neo_megatron.model.config import NeoSizes

PUBLISHED_SIZES = {
    # Qwen3-1.7B-Base after 12 pre-buffer layers.
    "neo-2b": NeoSizes(
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
    ),
    # Qwen3-8B-Base after 6 pre-buffer layers.
    "neo-9b": NeoSizes(
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
    ),
}
