"""Real models to compare the planner with are built without a GPU."""

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()
