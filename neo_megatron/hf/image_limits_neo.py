"""The limits of `images_neo`; an export has a copy of `neo_megatron/data/image_limits.py` in place of this one."""

from neo_megatron.data.image_limits import MAX_FILE_BYTES, TooCostly, check_bytes, check_opened, without_end

__all__ = ["MAX_FILE_BYTES", "TooCostly", "check_bytes", "check_opened", "without_end"]
