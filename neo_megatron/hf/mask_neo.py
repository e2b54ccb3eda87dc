"""What `neo_megatron/model/mask.py` says of who sees whom; an export has a copy of that file in this one's place."""

from neo_megatron.model.mask import AttentionRule

__all__ = ["AttentionRule"]
