"""`chat()` as in the published model: one question, with or without images, after a history.

Control tokens are placed by their id, between pieces of text in which no special token is recognised, as in the
training data: what a user types stays text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from .tags_neo import IMAGE_TAG, VIDEO_TAG, as_literal, count_tags, split_tags

MERGE_SIZE = 2
ROLES = ("system", "user", "assistant")

Turn = tuple[str, str]
"""Role and text."""
Message = tuple[str, str] | Mapping[str, str]
"""A question with its answer, or one turn as ``{"role": "system", "content": "Be terse."}``."""


class NEOChatMixin:
    """For a model with `generate()`.

    Attributes:
        system_message: text of a system turn in front of every conversation of `chat`; "" for none, as in training.
    """

    system_message: str = ""

    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: Mapping[str, Any],
        history: Sequence[Message] | None = None,
        return_history: bool = False,
        grid_hw: Tensor | Sequence[Sequence[int]] | None = None,
        verbose: bool = False,
    ) -> str | tuple[str, list[Message]]:
        """The answer to a question.

        As in the published code, settings that depend on earlier tokens see only those of the answer:
        ``repetition_penalty``, ``no_repeat_ngram_size``, ``bad_words_ids``, ``sequence_bias``, ``stop_strings``,
        ``prefix_allowed_tokens_fn``, ``logits_processor``, ``stopping_criteria``, ``streamer``. In `generate` they
        also see the prompt. ``max_length`` and ``min_length`` count the prompt in both.

        Args:
            tokenizer: the one saved with the model.
            pixel_values, grid_hw: of all images of the conversation in the order of their `<image>` tags, as the
                image processor returns them; ``None`` without images.
            question: with a tag at the place of every image. If the conversation has no tag, the image comes in front
                of the first question. A tag after a backslash, and any in an answer, is text.
            generation_config: arguments of `generate`, such as ``{"max_new_tokens": 512, "do_sample": False}``.
            history: earlier questions and answers, as an earlier call returned them. Turns may be messages instead; a
                system turn there, which comes first, replaces ``system_message``.
            return_history: also return the history with this question and its answer.
            verbose: print both.

        Raises:
            ValueError: tags and images differ in number; the history holds something else.
        """
        history = list(history or [])
        turns = [*_turns(history), ("user", question)]
        grids = [] if grid_hw is None else torch.as_tensor(grid_hw).reshape(-1, 2).tolist()
        if pixel_values is not None and not any(map(_slots, turns)):
            history, question, turns = _with_tag(history, question, turns)
        _check_turns(turns, len(grids), given=pixel_values is not None)
        if self.system_message and turns[0][0] != "system":
            turns = [("system", as_literal(self.system_message)), *turns]  # it cannot contain an image
        # Offloaded weights are on no device.
        device = next((weight.device for weight in self.parameters() if not weight.is_meta), torch.device("cpu"))
        ids = torch.tensor([list(_tokens(tokenizer, turns, grids))], device=device)
        images = {}
        if pixel_values is not None:
            images = {"pixel_values": pixel_values.to(device), "grid_hw": torch.tensor(grids, device=device)}
        settings = {"eos_token_id": _id(tokenizer, "<|im_end|>"), "pad_token_id": tokenizer.pad_token_id}
        settings = _about_the_answer({**settings, **generation_config}, self.generation_config, tokenizer, ids)
        generated = self.generate(ids, attention_mask=torch.ones_like(ids), **images, **settings)
        answer = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
        if verbose:
            print(question, answer, sep="\n")
        return (answer, [*history, (question, answer)]) if return_history else answer


def _turns(history: Sequence[Message]) -> list[Turn]:
    turns: list[Turn] = []
    for number, entry in enumerate(history):
        if isinstance(entry, Mapping):
            role, text = entry.get("role"), entry.get("content")
            if entry.keys() != {"role", "content"} or role not in ROLES or not isinstance(text, str):
                raise ValueError(
                    f"history[{number}] must have a 'role' ({', '.join(ROLES)}) and a string as 'content', not "
                    f"{str(entry):.200}"
                )
            turns.append((role, text))
        elif isinstance(entry, (tuple, list)) and len(entry) == 2 and all(isinstance(text, str) for text in entry):
            turns += [("user", entry[0]), ("assistant", entry[1])]
        else:
            raise ValueError(f"history[{number}] must be a question and its answer, two strings, not {entry!r:.200}")
    if any(role == "system" for role, _ in turns[1:]):
        raise ValueError("a system turn in the history must be its first: NEO was trained on no other")
    return turns


def _slots(turn: Turn) -> int:
    """Number of image tags of a turn; in an answer a tag is text."""
    role, text = turn
    return 0 if role == "assistant" else count_tags(text, IMAGE_TAG)


def _with_tag(history: list[Message], question: str, turns: list[Turn]) -> tuple[list[Message], str, list[Turn]]:
    """The conversation with an image tag in front of its first question."""
    first = next(number for number, (role, _) in enumerate(turns) if role == "user")
    text = f"{IMAGE_TAG}\n{turns[first][1]}"
    turns = [*turns[:first], ("user", text), *turns[first + 1 :]]
    for number, entry in enumerate(history):
        if not isinstance(entry, Mapping):
            return [*history[:number], (text, entry[1]), *history[number + 1 :]], question, turns
        if entry["role"] == "user":
            return [*history[:number], {**entry, "content": text}, *history[number + 1 :]], question, turns
    return history, text, turns


def _check_turns(turns: Sequence[Turn], grids: int, given: bool) -> None:
    if any(count_tags(text, VIDEO_TAG) for role, text in turns if role != "assistant"):
        raise ValueError(
            f"the conversation has a {VIDEO_TAG} tag: give the frames as images, with an {IMAGE_TAG} tag for "
            f"each, or write \\{VIDEO_TAG} for the word"
        )
    tags = sum(map(_slots, turns))
    if tags != grids or given != bool(grids):
        raise ValueError(
            f"{grids} images in grid_hw for {tags} {IMAGE_TAG} tags: give pixel_values and grid_hw of one image for "
            f"each tag, those of the history first; a tag that is meant as text is written \\{IMAGE_TAG}"
        )


def _tokens(tokenizer: Any, turns: Sequence[Turn], grids: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The ids of a conversation up to the answer to come; the published code cuts texts at the same places."""
    counts = iter(rows * columns // MERGE_SIZE**2 for rows, columns in grids)
    turn_start, turn_end = _id(tokenizer, "<|im_start|>"), _id(tokenizer, "<|im_end|>")
    for role, text in turns:
        yield turn_start
        if role == "assistant":
            yield from (*_text(tokenizer, "assistant\n"), *_text(tokenizer, "".join(split_tags(text))))
        else:
            first, *others = split_tags(text)[::2]
            yield from _text(tokenizer, f"{role}\n{first}")
            for literal in others:
                yield _id(tokenizer, "<img>")
                yield from [_id(tokenizer, "<IMG_CONTEXT>")] * next(counts)
                yield _id(tokenizer, "</img>")
                yield from _text(tokenizer, literal)
        yield from (turn_end, *_text(tokenizer, "\n"))
    yield from (turn_start, *_text(tokenizer, "assistant\n"))


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _text(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


class _AnswerProcessor(LogitsProcessor):
    """A logits processor that sees only the tokens of the answer."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor], prompt_length: int) -> None:
        self._inner = inner
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._inner(input_ids[:, self._prompt_length :], scores)


class _AnswerCriterion(StoppingCriteria):
    """A stopping criterion that sees only the tokens of the answer."""

    def __init__(self, inner: Callable[..., Any], prompt_length: int) -> None:
        self._inner = inner
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self._inner(input_ids[:, self._prompt_length :], scores, **kwargs)


class _AnswerStreamer(BaseStreamer):
    """Streams everything but the prompt, which `generate` puts first."""

    def __init__(self, inner: BaseStreamer) -> None:
        self._inner = inner
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        self._inner.put(value[..., :0] if self._in_prompt else value)
        self._in_prompt = False

    def end(self) -> None:
        self._inner.end()


def _about_the_answer(settings: dict[str, Any], defaults: Any, tokenizer: Any, prompt: Tensor) -> dict[str, Any]:
    """Arguments of `generate` that restrict settings to the answer, which would otherwise also see the prompt.

    Args:
        settings: as requested.
        defaults: the model's generation config, used where ``settings`` has no value.
        prompt: ids `[1, L]`.
    """
    length = prompt.shape[1]

    def take(name: str, unset: Any = None) -> Any:
        """The value in force, removed from the settings."""
        default = getattr(defaults, name, None)
        if unset is None and default is not None:
            return None  # `generate` adds the model's own in any case
        value = settings.pop(name, None)
        value = default if value is None else value
        if unset is not None:
            settings[name] = unset
        return None if value == unset else value

    processors, criteria = settings.pop("logits_processor", None) or [], settings.pop("stopping_criteria", None) or []
    before: list[Any] = []
    if (bias := take("sequence_bias")) is not None:
        before.append(SequenceBiasLogitsProcessor(bias))
    if (penalty := take("repetition_penalty", 1.0)) is not None:
        before.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if (size := take("no_repeat_ngram_size", 0)) is not None:
        before.append(NoRepeatNGramLogitsProcessor(size))
    if (words := take("bad_words_ids")) is not None:
        ends = torch.tensor(settings["eos_token_id"], device=prompt.device).reshape(-1)
        before.append(NoBadWordsLogitsProcessor(words, ends))
    if (strings := take("stop_strings")) is not None:
        criteria = [StopStringCriteria(tokenizer, strings), *criteria]
    if (allowed := settings.pop("prefix_allowed_tokens_fn", None)) is not None:
        settings["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row, ids[length:])
    if (streamer := settings.pop("streamer", None)) is not None:
        settings["streamer"] = _AnswerStreamer(streamer)
    if processors := [*before, *processors]:
        settings["logits_processor"] = LogitsProcessorList(_AnswerProcessor(one, length) for one in processors)
    if criteria:
        settings["stopping_criteria"] = StoppingCriteriaList(_AnswerCriterion(one, length) for one in criteria)
    return settings
