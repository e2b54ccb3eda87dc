"""What `neo_megatron/data/tags.py` says about tags in text; an export has a copy of that file in this one's place."""

from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, as_literal, count_tags, escape_tags, split_tags

__all__ = ["IMAGE_TAG", "VIDEO_TAG", "as_literal", "count_tags", "escape_tags", "split_tags"]
