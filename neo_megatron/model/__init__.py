"""The Megatron-Core NEO model. `neo_megatron.megatron_compat.cpu_platform.install()` is called before it is built."""
