"""Draws a realistic mix of samples to pack.

35 % web photos, 20 % large photos, 20 % document pages, 10 % with 2 to 4 images, 15 % text alone; lengths of texts are
log-normal.
"""

from dataclasses import dataclass

import numpy as np

MIN_PIXELS, MAX_PIXELS, SIDE = 65536, 4194304, 32
# share, (width, height) and spread of the log-normal sizes, fewest and most images
_KINDS = [
    (0.35, (640, 480), 0.35, 1, 1),
    (0.20, (1280, 960), 0.35, 1, 1),
    (0.20, (1654, 2339), 0.25, 1, 1),
    (0.10, (640, 480), 0.30, 2, 4),
    (0.15, (0, 0), 0.0, 0, 0),
]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """Size of one sample: text tokens, and (rows, columns) of image tokens of each image."""

    text: int
    grids: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return self.text + sum(rows * columns + 2 for rows, columns in self.grids)

    def shrunk(self, factor: int) -> "Sample":
        """The sample with text and both sides of every image divided by ``factor``."""
        grids = tuple((max(rows // factor, 1), max(columns // factor, 1)) for rows, columns in self.grids)
        return Sample(max(self.text // factor, 12), grids)


def draw_samples(count: int, seed: int = 0) -> list[Sample]:
    """The samples whose lengths `draw_lengths` returns; for a few thousand."""
    text, images = _draw(count, np.random.default_rng(seed))
    grids: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for rows, sizes in images:
        for row, (height, width) in zip(rows.tolist(), sizes.T.tolist(), strict=True):
            grids[row].append((height // SIDE, width // SIDE))
    return [Sample(tokens, tuple(of)) for tokens, of in zip(text.tolist(), grids, strict=True)]


def draw_lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, of which image tokens) of each sample, int32 [count] both."""
    tokens, image_tokens = np.empty(count, np.int32), np.empty(count, np.int32)
    random = np.random.default_rng(seed)
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        tokens[part], images = _draw(part.stop - part.start, random)
        image_tokens[part] = 0
        for rows, sizes in images:
            here = sizes.prod(axis=0) // SIDE**2
            image_tokens[start + rows] += here
            tokens[start + rows] += here + 2
    return tokens, image_tokens


def _draw(count: int, random: np.random.Generator) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Text tokens of each sample; and (samples, (height, width) of an image of each, in pixels), again and again."""
    kind = random.choice(len(_KINDS), count, p=[share for share, *_ in _KINDS])
    text = np.clip(random.lognormal(4.3, 1.0, count), 12, 6000).astype(np.int64) + 20
    alone = kind == len(_KINDS) - 1
    text[alone] = np.clip(random.lognormal(5.5, 1.0, int(alone.sum())), 20, 8000).astype(np.int64)
    sized, images = [], np.zeros(count, np.int64)
    for number, (_, (width, height), spread, fewest, most) in enumerate(_KINDS):
        rows = np.flatnonzero(kind == number)
        images[rows] = random.integers(fewest, most + 1, len(rows))
        for turn in range(most):
            of = rows[images[rows] > turn]
            limit = np.where(
                images[of] > 1, np.maximum(MAX_PIXELS * 2 // np.maximum(images[of], 1), MIN_PIXELS), MAX_PIXELS
            )
            sizes = np.exp(random.normal(0, spread, (2, len(of)))) * np.array([[height], [width]])
            sized.append((of, _resized(sizes.astype(np.int64), limit)))
    return text, sized


def _resized(sizes: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """`neo_megatron.data.image.smart_resize` for many (height, width)."""
    rounded = np.maximum(SIDE, np.round(sizes / SIDE).astype(np.int64) * SIDE)
    area = rounded.prod(axis=0)
    shrink = np.sqrt(sizes.prod(axis=0) / limit)
    grow = np.sqrt(MIN_PIXELS / sizes.prod(axis=0))
    smaller = np.maximum(SIDE, np.floor(sizes / shrink / SIDE).astype(np.int64) * SIDE)
    larger = np.ceil(sizes * grow / SIDE).astype(np.int64) * SIDE
    return np.where(area > limit, smaller, np.where(area < MIN_PIXELS, larger, rounded))
