"""Measurements of speed and memory, next to what they are compared to; `neo-megatron benchmark` runs them."""
