"""The errors of `images_neo`; an export has a copy of `neo_megatron/errors.py` in place of this one."""

from neo_megatron.errors import RejectedSample

__all__ = ["RejectedSample"]
