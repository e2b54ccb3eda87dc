"""The parts of the page that `neo-megatron inspect` writes."""
