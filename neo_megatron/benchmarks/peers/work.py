"""The work that every way of loading shares: an image and its caption to tokens and patches, samples to packs.

Peers get it as functions to call, so that what differs between the ways is reading, shuffling, packing and resuming.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import pack_tensors
from neo_megatron.data.image import grid_of_size, patches_from_image

LENGTH = 16384
SHUFFLE_BUFFER = 256  # samples, of the peers that shuffle in a buffer
LIMITS = PreprocessConfig()


@dataclass(frozen=True)
class Sample:
    """An image and its caption as the model takes them.

    Args:
        number: of the pair.
        tokens: int32 [n].
        grid: of the image in patches.
        patches: uint8 [image tokens, 4, 768].
    """

    number: int
    tokens: np.ndarray
    grid: tuple[int, int]
    patches: np.ndarray


class Work:
    """Turns pairs into samples, and samples into the tensors of a pack.

    Attributes:
        length: of a pack, in tokens.

    Args:
        written: by `write`.
    """

    def __init__(self, written: Path) -> None:
        parts = json.loads(written.read_text())
        self.length: int = parts["length"]
        self.ids = SpecialIds(**parts["ids"])
        self.tokenizer_json: str = parts["json"]
        self._tokenizer = Tokenizer.from_str(self.tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._end = self._tokenizer.token_to_id("<|endoftext|>")

    @staticmethod
    def write(path: Path, tokenizer_json: str, ids: SpecialIds, length: int) -> Path:
        """Writes the file that the constructor reads; returns its path."""
        path.write_text(json.dumps({"json": tokenizer_json, "ids": vars(ids), "length": length}))
        return path

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """(grid_h, grid_w) in patches of an opened image, from its size alone."""
        return grid_of_size(image.height, image.width, "", LIMITS.min_pixels, LIMITS.max_pixels)

    def tokens(self, grid: tuple[int, int], caption: str) -> np.ndarray:
        """int32 [n]: the image, a line break, the caption and the token that ends a text."""
        ids, count = self.ids, grid[0] * grid[1] // 4
        text = self._tokenizer.encode(f"\n{caption}", add_special_tokens=False).ids
        return np.array(
            [ids.image_start, *[ids.image_context] * count, ids.image_end, *text, self._end],
            np.int32,
        )

    def sample(self, number: int, image: Image.Image, caption: str) -> Sample:
        """The sample of a pair, whose image is decoded or about to be."""
        grid = self.grid(image)
        return self.encoded(number, self.tokens(grid, caption), grid, image)

    def encoded(self, number: int, tokens: np.ndarray, grid: tuple[int, int], image: Image.Image) -> Sample:
        """The sample of a pair that is tokenized already."""
        return Sample(number, tokens, grid, patches_from_image(image.convert("RGB"), grid))

    def pack(self, samples: list[Sample]) -> dict[str, Any]:
        """The tensors of a pack, as of `PackDataset`, and ``numbers``, those of its samples."""
        joined = np.concatenate([sample.tokens for sample in samples])
        tokens, document = np.full(self.length, self.ids.pad, np.int64), np.full(self.length, -1, np.int32)
        tokens[: len(joined)] = joined
        document[: len(joined)] = np.repeat(np.arange(len(samples)), [len(sample.tokens) for sample in samples])
        image = (self.ids.image_start, self.ids.image_context, self.ids.image_end)
        targets = np.flatnonzero((document >= 0) & ~np.isin(tokens, image))
        counts = np.bincount(document[targets], minlength=len(samples))
        weight = (counts[document[targets]] ** -0.5).astype(np.float32)
        patches = np.concatenate([sample.patches for sample in samples])
        grids = np.array([sample.grid for sample in samples], np.int32)
        tensors = pack_tensors(tokens, document, grids, self.ids, targets, weight, patches)
        return {**tensors, "numbers": [sample.number for sample in samples]}


class Loader(Protocol):
    """A data loader over the prepared form of the pairs; ``save`` and ``restore`` as its documentation has them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The packs of an epoch, or of the rest of it after `restore`."""

    def save(self, path: Path) -> None:
        """Writes the state after the last pack."""

    def restore(self, path: Path) -> None:
        """Continues after that pack."""


class Concatenation:
    """Packs for peers that have no packing: samples are joined in their order until the next one does not fit.

    Attributes:
        state: of the source, at the end of the last pack.

    Args:
        work: makes packs.
        samples: of an epoch.
        state: of the source; called before each sample is drawn, because the one that does not fit into a pack has to
            be drawn again after resuming.
    """

    def __init__(self, work: Work, samples: Iterable[Sample], state: Callable[[], Any]) -> None:
        self._work, self._samples, self._state = work, samples, state
        self.state = state()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pack: list[Sample] = []
        length, source = 0, iter(self._samples)
        while True:
            before = self._state()
            if (sample := next(source, None)) is None:
                break
            if length + len(sample.tokens) > self._work.length:
                self.state = before
                yield self._work.pack(pack)
                pack, length = [], 0
            pack.append(sample)
            length += len(sample.tokens)
        if pack:
            self.state = self._state()
            yield self._work.pack(pack)


def header(data: bytes) -> Image.Image:
    """An opened image that is not decoded yet."""
    return Image.open(io.BytesIO(data))
