"""Image preprocessing of `neo_megatron/data/image.py`; an export has a copy of that file in place of this one."""

from neo_megatron.data.image import (
    decode,
    decode_opened,
    image_grid,
    normalise,
    patches_from_image,
    pixel_limit,
    read_image,
)

__all__ = ["decode", "decode_opened", "normalise", "patches_from_image", "image_grid", "pixel_limit", "read_image"]
