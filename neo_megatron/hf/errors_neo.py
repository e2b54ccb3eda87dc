"""The errors of `images_neo`; an export has a copy of `neo_megatron/errors.py` in this one's place."""

from neo_megatron.errors import RejectedSample

__all__ = ["RejectedSample"]
