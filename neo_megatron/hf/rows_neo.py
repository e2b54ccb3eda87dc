"""Turns prompts into rows of token ids, cut where the training data is cut, so that BPE does not merge across.

Control tokens are placed by their id, between pieces of text in which no special token is recognised.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tags_neo import IMAGE_TAG, VIDEO_TAG, as_literal, split_tags

# Marks control tokens that a user typed, until they are tokenized as text: a character that Unicode reserves for such
# use, so that it occurs in no text.
TYPED = "\ufdd0"


@dataclass
class Layout:
    """Pieces of a prompt: (text, control token or image, whether it is in an answer), ``None`` for an image."""

    pieces: list[tuple[str | int | None, bool]] = field(default_factory=list)

    @property
    def images(self) -> int:
        return sum(piece is None for piece, _ in self.pieces)


@dataclass(frozen=True)
class EncodedText:
    """Token ids, and a mask with 1 for tokens of answers."""

    ids: list[int]
    in_answer: list[int]


class PromptEncoder:
    """Tokenizes prompts as `apply_chat_template` renders them.

    Args:
        tokenizer: transformers' own, fast.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._controls = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def mark_typed(self, text: str) -> str:
        """The text of a message with control tokens marked as typed."""
        return self._controls.sub(lambda found: f"{found[0][0]}{TYPED}{found[0][1:]}", text)

    def lay_out(self, prompt: str, answers: Sequence[tuple[int, int]] = ()) -> Layout:
        """The pieces of a prompt.

        Args:
            answers: half-open spans of characters whose tokens are marked.

        Raises:
            ValueError: a `<video>` tag.
        """
        layout, controls = Layout(), list(self._controls.finditer(prompt))
        cuts = {place for span in answers for place in span}
        starts, ends = [0, *(control.end() for control in controls)], [control.start() for control in controls]
        says = False  # whether the text is that of an assistant's turn, where a tag is text
        for number, (start, end) in enumerate(zip(starts, [*ends, len(prompt)], strict=True)):
            header = f"{controls[number - 1][0]}{prompt[start:end]}" if number else ""
            if header.startswith("<|im_start|>"):
                says = header.startswith("<|im_start|>assistant\n")
                if says:  # header and content are two strings in training
                    cuts.add(start + len("assistant\n"))
            places = [start, *sorted(cut for cut in cuts if start < cut < end), end]
            for first, last in zip(places, places[1:], strict=False):
                text = as_literal(prompt[first:last]) if says else prompt[first:last]
                self._add_text(layout, text, _within(first, answers))
            if number < len(controls):
                control = self._tokenizer.convert_tokens_to_ids(controls[number][0])
                layout.pieces.append((control, _within(end, answers)))
        return layout

    def encode(self, layouts: Sequence[Layout], sizes: Sequence[int]) -> list[EncodedText]:
        """Rows of token ids; ``sizes`` are the tokens of each image of all prompts in order."""
        texts = list(dict.fromkeys(piece for layout in layouts for piece, _ in layout.pieces if isinstance(piece, str)))
        encoded = (
            self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
        )
        ids = dict(zip(texts, encoded, strict=True))
        start, context, end = self._tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>", "</img>"])
        left = iter(sizes)
        rows = []
        for layout in layouts:
            row = EncodedText([], [])
            for piece, in_answer in layout.pieces:
                if piece is None:
                    new = [start, *[context] * next(left), end]
                else:
                    new = ids[piece] if isinstance(piece, str) else [piece]
                row.ids.extend(new)
                row.in_answer.extend([int(in_answer)] * len(new))
            rows.append(row)
        return rows

    def _add_text(self, layout: Layout, text: str, in_answer: bool) -> None:
        for number, piece in enumerate(split_tags(text)):
            if number % 2 and piece == VIDEO_TAG:
                raise ValueError(
                    f"the text has a {VIDEO_TAG} tag: give the frames as images, with an {IMAGE_TAG} tag for each, or "
                    f"write \\{VIDEO_TAG} for the word"
                )
            layout.pieces.append((None if number % 2 else piece.replace(TYPED, ""), in_answer))


def _within(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= place < end for start, end in spans)


def padded_rows(
    columns: Mapping[str, list[list[int]]],
    values: Mapping[str, int],
    padding: bool | str,
    side: str,
    max_length: int,
    multiple: int | None,
) -> dict[str, list[list[int]]]:
    """Rows of all columns at one length, with 0 or the column's own value.

    Args:
        padding: True or "longest", "max_length", or False or "do_not_pad".
        side: where padding goes, "left" or "right".
        multiple: the length is a multiple of this.

    Raises:
        ValueError: another padding or side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r}: say 'left' or 'right'")
    if padding in (False, "do_not_pad"):
        return dict(columns)
    if padding not in (True, "longest", "max_length"):
        raise ValueError(f"padding={padding!r}: say True, False, 'longest' or 'max_length'")
    length = max((len(row) for rows in columns.values() for row in rows), default=0)
    length = max(length, max_length) if padding == "max_length" else length
    length = -(-length // multiple) * multiple if multiple else length
    padded = {}
    for name, rows in columns.items():
        fill = [[values.get(name, 0)] * (length - len(row)) for row in rows]
        pairs = zip(fill, rows, strict=True) if side == "left" else zip(rows, fill, strict=True)
        padded[name] = [[*first, *second] for first, second in pairs]
    return padded
