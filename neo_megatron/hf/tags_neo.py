"""Tags in text, as `neo_megatron/data/tags.py` defines them; an export has a copy of that file in place of this one."""

from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, as_literal, count_tags, escape_tags, split_tags

__all__ = ["IMAGE_TAG", "VIDEO_TAG", "as_literal", "count_tags", "escape_tags", "split_tags"]
