"""The commands of `neo-megatron`, one module each."""
