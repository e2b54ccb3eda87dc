"""The attention mask of `neo_megatron/model/mask.py`; an export has a copy of that file in place of this one."""

from neo_megatron.model.mask import AttentionRule

__all__ = ["AttentionRule"]
