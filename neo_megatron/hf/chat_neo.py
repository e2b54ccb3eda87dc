"""`chat()` as the published model has it: one question, about pictures or not, after those before it.

Control tokens are placed by their id, between pieces of text in which no special token is recognised, as in the
training data: what a user types stays text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE_TAG = "<image>"
MERGE_SIZE = 2


class NEOChatMixin:
    """For a model with `generate()`."""

    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: Mapping[str, Any],
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        grid_hw: Tensor | Sequence[Sequence[int]] | None = None,
        verbose: bool = False,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """The answer to a question.

        Args:
            tokenizer: the one beside the model.
            pixel_values, grid_hw: of all pictures of the conversation in the order of their `<image>` tags, as the
                image processor returns them; ``None`` without pictures.
            question: with a tag at the place of every picture. Where none of the conversation has one, the picture
                comes in front of the first question.
            generation_config: arguments of `generate`, such as ``{"max_new_tokens": 512, "do_sample": False}``.
            history: earlier questions and answers, as a former call returned them.
            return_history: also return the history with this question and its answer.
            verbose: print both.

        Raises:
            ValueError: tags and pictures differ in number.
        """
        turns = [*(history or []), (question, None)]
        grids = [] if grid_hw is None else torch.as_tensor(grid_hw).reshape(-1, 2).tolist()
        if pixel_values is not None and not any(IMAGE_TAG in asked for asked, _ in turns):
            turns[0] = (f"{IMAGE_TAG}\n{turns[0][0]}", turns[0][1])
        tags = sum(asked.count(IMAGE_TAG) for asked, _ in turns)
        if tags != len(grids) or (pixel_values is None) != (not grids):
            raise ValueError(
                f"{len(grids)} pictures in grid_hw for {tags} {IMAGE_TAG} tags: give pixel_values and grid_hw of one "
                "picture for each tag, those of the history first"
            )
        # Weights that wait on disk or in main memory for their turn are on no device.
        device = next((weight.device for weight in self.parameters() if not weight.is_meta), torch.device("cpu"))
        ids = torch.tensor([list(_tokens(tokenizer, turns, grids))], device=device)
        pictures = {}
        if pixel_values is not None:
            pictures = {"pixel_values": pixel_values.to(device), "grid_hw": torch.tensor(grids, device=device)}
        settings = {"eos_token_id": _id(tokenizer, "<|im_end|>"), "pad_token_id": tokenizer.pad_token_id}
        settings |= generation_config
        generated = self.generate(ids, attention_mask=torch.ones_like(ids), **pictures, **settings)
        answer = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
        asked, _ = turns[-1]
        if verbose:
            print(asked, answer, sep="\n")
        return (answer, [*turns[:-1], (asked, answer)]) if return_history else answer


def _tokens(tokenizer: Any, turns: Sequence[tuple[str, str | None]], grids: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The ids of a conversation up to the answer to come; the published code cuts texts at the same places."""
    cells = iter(rows * columns // MERGE_SIZE**2 for rows, columns in grids)
    turn_start, turn_end = _id(tokenizer, "<|im_start|>"), _id(tokenizer, "<|im_end|>")
    for asked, answered in turns:
        first, *others = f"user\n{asked}".split(IMAGE_TAG)
        yield from (turn_start, *_text(tokenizer, first))
        for text in others:
            yield _id(tokenizer, "<img>")
            yield from [_id(tokenizer, "<IMG_CONTEXT>")] * next(cells)
            yield _id(tokenizer, "</img>")
            yield from _text(tokenizer, text)
        yield from (turn_end, *_text(tokenizer, "\n"), turn_start, *_text(tokenizer, "assistant\n"))
        if answered is not None:
            yield from (*_text(tokenizer, answered), turn_end, *_text(tokenizer, "\n"))


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _text(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
