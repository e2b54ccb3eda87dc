r"""Conversations -> token ids, the spans that are trained on, and the places of the images.

Every turn is ``<|im_start|>{role}\n{content}<|im_end|>\n``. An ``<image>`` tag becomes ``<img>``, an ``<IMG_CONTEXT>``
for each image token of the image, and ``</img>``; none of these are ever trained on. In the turn of an assistant, and
after a backslash, a tag is text. Control tokens are inserted as ids between pieces of text in which no special token is
recognised: what a user types stays text.

That is the layout neo1_0. Layout u1 is that of SenseNova-U1's training:

* an answer that does not begin with ``<think>`` has an empty, untrained block ``<think>\n\n</think>\n\n`` in front;
* an untrained turn of an assistant has no block, and is tokenized as one string;
* a fixed sentence that asks for thinking is cut out of the system turn; an empty system turn is left out;
* there are turns of knowledge, plugins and interpreters.

A turn of the role "document" has no template: its text as it is, images as in a chat, and the token that ends a text.
All of it is trained on except for images, and for the first token, which has nothing before it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from neo_megatron.data.config import ChatLayout
from neo_megatron.data.conversation import Turn
from neo_megatron.data.tags import IMAGE_TAG, split_tags
from neo_megatron.data.tokenizer_checks import check_built, check_tokenizer_files
from neo_megatron.errors import DataError

# In the order of their ids; a Qwen3 tokenizer has <|im_start|> and <|im_end|> already.
NEO_TOKENS = (
    *("<IMG_CONTEXT>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
    *("<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
)
# Ends a document: of GPT-2 and Qwen, Llama 3, and DeepSeek.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")

_THINK, _END_OF_THINKING = "<think>", "</think>"
# Of layout u1: asks for thinking in data of other models. The line break in front of it goes too.
_THINKING_PROMPT = (
    "Reason step by step and place the thought process within the <think></think> tags, and provide the final "
    "conclusion at the end."
)
# Of layout u1: role -> header of its turns up to the control token in it, and that token.
_HEADERS_WITH_TOKENS = {
    "plugin": ("system name=", "<|plugin|>"),
    "plugin-return": ("environment name=", "<|plugin|>"),
    "interpreter": ("system name=", "<|interpreter|>"),
    "interpreter-return": ("environment name=", "<|interpreter|>"),
}

_Piece = tuple[str | list[int], bool]
"""Text or ids, and whether they are trained on."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the control tokens: all that readers of tokenized samples need to know about the tokenizer."""

    image_context: int
    image_start: int
    image_end: int
    turn_start: int
    turn_end: int
    pad: int


@dataclass(frozen=True)
class TokenizedSample:
    """``tokens`` int32 [n]; ``spans`` int32 [k, 2]: half-open ranges of trained tokens, ascending and disjoint."""

    tokens: np.ndarray
    spans: np.ndarray


def add_neo_tokens(tokenizer: Any) -> int:
    """Appends the special tokens of NEO that a transformers tokenizer lacks; returns how many those are."""
    return tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in NEO_TOKENS], True)


def load_tokenizer(directory: str | Path) -> Any:
    """The transformers tokenizer of a local directory, with NEO's tokens.

    Raises:
        DataError: the directory has no tokenizer; it cannot be read, has no fast form or no pad token; or a part of it
            is not safe to use, see `tokenizer_checks`.
    """
    # Imported here: transformers brings torch, and the workers of preprocessing import this module without either.
    from transformers import AutoTokenizer

    if not any(os.path.lexists(Path(directory) / name) for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"{directory} does not hold a tokenizer; give a Hugging Face directory with a tokenizer.json")
    check_tokenizer_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), use_fast=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises the bare type for a broken tokenizer.json
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the tokenizer of {directory} cannot be read ({reason}); copy or download it again") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {directory} has no fast form; load it with transformers and save it as tokenizer.json"
        )
    check_built(tokenizer.backend_tokenizer.to_str(), directory)
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer in {directory} has no pad token; set pad_token in its tokenizer_config.json")
    add_neo_tokens(tokenizer)
    return tokenizer


def special_ids(tokenizer: Any) -> SpecialIds:
    """Ids of the control tokens in a transformers tokenizer that has NEO's tokens."""
    context, start, end, turn_start, turn_end = tokenizer.convert_tokens_to_ids(
        ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"]
    )
    return SpecialIds(context, start, end, turn_start, turn_end, tokenizer.pad_token_id)


def tokenizer_fingerprint(tokenizer_json: str) -> str:
    """SHA-256 of the parts that decide the ids of a text: vocabulary, merges, added tokens, normalizer, pre-tokenizer.

    The rest of a ``tokenizer.json`` (decoder, padding, spelling of the merges) differs between library versions.
    """
    parts = json.loads(tokenizer_json)
    model = parts["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    added = sorted((token["id"], token["content"], token["special"]) for token in parts["added_tokens"])
    defining = [model["type"], model["vocab"], merges, added, parts["normalizer"], parts["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()


class ChatEncoder:
    """Tokenizes conversations in batches.

    Args:
        tokenizer_json: the fast tokenizer as text (``tokenizer.backend_tokenizer.to_str()``), NEO's tokens included.
        ids: its control tokens.
        layout: see the top of this module.

    Raises:
        DataError: the layout is u1, and the tokenizer lacks ``<think>`` or ``</think>``.
    """

    def __init__(self, tokenizer_json: str, ids: SpecialIds, layout: ChatLayout = "neo1_0") -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "special tokens are encoded as the text they are"
        self._ids = ids
        self._layout = layout
        self._empty_thoughts = self._block() if layout == "u1" else []

    def encode(self, samples: Sequence[tuple[Sequence[Turn], Sequence[int]]]) -> list[TokenizedSample]:
        """Tokenizes samples, each given as its turns and the image tokens of each of its images, in order.

        Raises:
            DataError: there is a document, and the tokenizer has no token that ends a text.
        """
        layouts = [self._lay_out(turns, image_tokens) for turns, image_tokens in samples]
        texts = list(dict.fromkeys(piece for layout in layouts for piece, _ in layout if isinstance(piece, str)))
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [_join(layout, ids) for layout in layouts]

    def _lay_out(self, turns: Sequence[Turn], image_tokens: Sequence[int]) -> list[_Piece]:
        """Pieces in order, cut where the published code cuts: BPE must not merge across."""
        images = iter(image_tokens)
        layout: list[_Piece] = []
        for turn in self._kept(turns):
            if turn.role == "document":
                layout += [*self._content(turn, "", images), ([self._end_of_text()], turn.trained)]
                continue
            header, opening = self._header(turn)
            layout += [([self._ids.turn_start], False), *header]
            layout += self._content(turn, opening, images)
            layout.append(([self._ids.turn_end], turn.trained))
            layout.append(("\n", turn.trained))
        return layout

    def _kept(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns; in layout u1 without the prompt for thinking in the system turn, or without that turn."""
        if self._layout != "u1" or not turns or turns[0].role != "system":
            return turns
        text = re.sub(rf"\n?{re.escape(_THINKING_PROMPT)}", "", turns[0].text)
        return [replace(turns[0], text=text), *turns[1:]] if text else turns[1:]

    def _header(self, turn: Turn) -> tuple[list[_Piece], str]:
        """The pieces after ``<|im_start|>``, and the text in front of the content that is tokenized with it."""
        if turn.role in _HEADERS_WITH_TOKENS:
            name, token = _HEADERS_WITH_TOKENS[turn.role]
            return [(name, False), ([self._tokenizer.token_to_id(token)], False)], "\n"
        if turn.role != "assistant" or (self._layout == "u1" and not turn.trained):
            return [], f"{turn.role}\n"
        # Header and content are two strings there, one string for the other roles.
        thoughts = [] if turn.text.startswith(_THINK) else self._empty_thoughts
        return [("assistant\n", False), *thoughts], ""

    def _block(self) -> list[_Piece]:
        ids = [self._tokenizer.encode(token, add_special_tokens=False).ids for token in (_THINK, _END_OF_THINKING)]
        if any(len(found) != 1 for found in ids):
            raise DataError(
                f"the tokenizer has no tokens {_THINK} and {_END_OF_THINKING} for text, which --chat-layout u1 needs; "
                "use that of a Qwen3, or --chat-layout neo1_0"
            )
        return [(ids[0], False), ("\n\n", False), (ids[1], False), ("\n\n", False)]

    def _content(self, turn: Turn, opening: str, images: Iterator[int]) -> Iterator[_Piece]:
        text = opening
        for number, piece in enumerate(split_tags(turn.text)):
            if number % 2 and piece == IMAGE_TAG and turn.role != "assistant":
                yield text, turn.trained
                yield self._image(next(images)), False
                text = ""
            else:
                text += piece
        yield text, turn.trained

    def _end_of_text(self) -> int:
        found = (self._tokenizer.token_to_id(token) for token in END_OF_TEXT)
        if (end := next((token for token in found if token is not None), None)) is None:
            raise DataError(
                f"the tokenizer has none of {', '.join(END_OF_TEXT)}, one of which has to end a document; use another "
                "--tokenizer, or leave documents out"
            )
        return end

    def _image(self, image_tokens: int) -> list[int]:
        return [self._ids.image_start, *[self._ids.image_context] * image_tokens, self._ids.image_end]


def _join(layout: list[_Piece], ids: dict[str, list[int]]) -> TokenizedSample:
    tokens: list[int] = []
    spans: list[list[int]] = []
    for piece, trained in layout:
        start = len(tokens)
        tokens += ids[piece] if isinstance(piece, str) else piece
        start = max(start, 1)  # the first token has nothing before it, so it cannot be a target
        if trained and spans and spans[-1][1] == start:
            spans[-1][1] = len(tokens)
        elif trained and start < len(tokens):
            spans.append([start, len(tokens)])
    return TokenizedSample(np.array(tokens, np.int32), np.array(spans, np.int32).reshape(-1, 2))
