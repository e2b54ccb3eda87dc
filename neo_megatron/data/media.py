"""The pictures of a checked sample, in the form in which a shard keeps them."""

import numpy as np

from neo_megatron.data.image import decode, patches_from_image, picture_grid, pixel_limit, read_picture
from neo_megatron.data.records import Sample
from neo_megatron.data.settings import Settings


def load_media(sample: Sample, settings: Settings) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Pictures as uint8 [n] each, encoded bytes or flattened patches, and their grids in patches.

    Raises:
        RejectedSample: for the first that is missing, broken or too large.
    """
    limit = pixel_limit(settings.min_pixels, settings.max_pixels, len(sample.pictures))
    pictures, grids = [], []
    for path in sample.pictures:
        data = read_picture(path)
        image = decode(data, path)
        grid = picture_grid(image, path, settings.min_pixels, limit)
        stored = np.frombuffer(data, np.uint8)
        if settings.image_store == "patches":
            stored = patches_from_image(image, grid).reshape(-1)
        pictures.append(stored)
        grids.append(grid)
    return pictures, grids
