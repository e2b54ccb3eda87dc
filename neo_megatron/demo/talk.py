"""Data for the page: an image as the model sees it, and an answer with the attention of its words."""

import base64
import io
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from neo_megatron.data.image import IMAGE_TOKEN_SIDE, decode, image_grid, read_image, resize_to_grid
from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.demo.words import words_of
from neo_megatron.inference.answering import Answerer, Piece
from neo_megatron.inference.attention_rows import AttentionRows, AttentionWatch

# A page needs no more pixels than a screen has.
LONGEST_SIDE_SHOWN = 1600
# Limit of the attention rows of all visitors' answers together, in bytes; an answer may have 300 MB.
MOST_ROWS = 1 << 30


@dataclass
class Answer:
    """One answer as it grows.

    Args:
        rows: attention of its tokens on the tokens of the image.
        layer: the layer that the page shows.
        stopped: set by others to end it; ``outdated``: its image is no longer on the page.
    """

    rows: AttentionRows
    layer: int
    pieces: list[Piece] = field(default_factory=list)
    running: bool = True
    stopped: bool = False
    outdated: bool = False
    note: str = ""

    def view(self) -> dict[str, Any]:
        """Data that answer.js draws."""
        words = words_of(self.pieces)
        rows = self.rows.of_layer(self.layer)
        means = [rows[word.tokens].mean(dim=0) if len(rows) else rows.new_empty(0) for word in words]
        return {
            "running": self.running,
            "note": "The heat maps of older answers are not kept: ask again to see it."
            if self.rows.forgotten
            else self.note,
            "words": [{"text": word.text, **_heat(mean)} for word, mean in zip(words, means, strict=True)],
            "all": _heat(torch.stack(means).mean(dim=0)) if means else {},
        }


def _heat(weights: Tensor) -> dict[str, Any]:
    """``levels``: base64 of a byte for each token, 255 at the largest; ``top``: the largest; ``share``: their sum."""
    if not len(weights):
        return {}
    top = weights.max()
    levels = (weights / top * 255).round().to(torch.uint8).numpy().tobytes()
    return {"levels": base64.b64encode(levels).decode(), "top": float(top), "share": float(weights.sum())}


class Talk:
    """A checkpoint that answers questions about images and can be watched."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._watch = AttentionWatch(answerer.model)
        self._alone = threading.Lock()  # an abandoned answer may not have stopped yet
        self._kept: deque[AttentionRows] = deque()
        parameters = sum(parameter.numel() for parameter in answerer.model.parameters())
        self.facts = f"{_short(parameters)} parameters, {answerer.model.dtype} on {answerer.model.device}".replace(
            "torch.", ""
        )
        self.layers: int = answerer.config.llm_config.num_hidden_layers
        self.pre_buffer_layers: int = answerer.config.llm_config.extra_num_layers

    def image_view(self, path: str) -> dict[str, Any]:
        """Data that image.js draws for an uploaded file.

        Raises:
            RejectedSample: for an image that preprocessing would reject.
        """
        name = Path(path).name
        image, settings = _read(path), self._answerer.settings
        grid = image_grid(image, name, settings.min_pixels, settings.max_pixels)
        seen = resize_to_grid(image, grid)
        rows, columns = seen.height // IMAGE_TOKEN_SIDE, seen.width // IMAGE_TOKEN_SIDE
        return {
            "address": _jpeg_address(seen),
            "name": name,
            "grid": [rows, columns],
            "facts": f"{name}: {image.width} × {image.height} pixels, seen by the model as {rows} × {columns} tokens",
        }

    def answers(self, question: str, path: str | None, layer: int, max_new_tokens: int) -> Iterator[Answer]:
        """One answer, repeatedly as it grows; ends when it is stopped.

        Raises:
            RejectedSample: for an image that preprocessing would reject, or tags in the question without an image.
        """
        prompt = self._answerer.prompt(question, [] if path is None else [_read(path)])
        tokens = torch.from_numpy(self._answerer.tokens([prompt])[0])
        columns = (tokens == self._answerer.config.img_context_token_id).nonzero()[:, 0]
        with self._alone, closing(self._answerer.stream(prompt, max_new_tokens)) as pieces:
            answer = Answer(self._watch.begin(columns), layer)
            self._keep(answer.rows)
            yield answer
            for piece in pieces:
                answer.pieces.append(piece)
                yield answer
                if answer.stopped:
                    break
        answer.running = False
        if sum(len(piece.tokens) for piece in answer.pieces) == max_new_tokens:
            answer.note = f"Cut at {max_new_tokens} tokens."
        yield answer

    def _keep(self, rows: AttentionRows) -> None:
        """Forgets the oldest answers' rows beyond the limit, but never those of the two newest."""
        self._kept.append(rows)
        while len(self._kept) > 2 and sum(kept.bytes for kept in self._kept) > MOST_ROWS:
            self._kept.popleft().forget()


def _short(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _read(path: str) -> Image.Image:
    with limited_memory():
        return decode(read_image(path), Path(path).name)


def _jpeg_address(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((LONGEST_SIDE_SHOWN, LONGEST_SIDE_SHOWN))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
