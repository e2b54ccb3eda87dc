"""3D-parallel pretraining of NEO, a native vision-language model, on Megatron-Core."""

__version__ = "0.2.0"
