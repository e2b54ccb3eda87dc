"""The Megatron-Core NEO model. A program that builds it calls `neo_megatron.cpu_platform.install()` first."""
