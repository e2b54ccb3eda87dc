"""One pack through a NEO in Hugging Face form and through Megatron's, layer by layer."""
