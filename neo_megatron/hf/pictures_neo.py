"""What `neo_megatron/data/image.py` does with a picture; an export has a copy of that file in this one's place."""

from neo_megatron.data.image import (
    decode,
    decode_opened,
    normalise,
    patches_from_image,
    picture_grid,
    pixel_limit,
    read_picture,
)

__all__ = ["decode", "decode_opened", "normalise", "patches_from_image", "picture_grid", "pixel_limit", "read_picture"]
