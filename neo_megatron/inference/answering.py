"""Answers prompts with a NEO checkpoint in Hugging Face form, in batches or as a stream.

No code of the checkpoint's directory runs: the modelling code is this package's own. Text is tokenized as training data
is, so typed control tokens such as `<|im_end|>` are text.
"""

import atexit
import os
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from neo_megatron.checkpoint.hub import model_directory
from neo_megatron.checkpoint.neo_directory import NeoDirectory, open_neo
from neo_megatron.checkpoint.pickled_directory import PickledDirectory
from neo_megatron.data.chat import ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.config import ChatLayout, PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.image import normalise
from neo_megatron.data.prepare.records import is_unicode
from neo_megatron.data.tags import as_literal
from neo_megatron.errors import CheckpointError, DataError
from neo_megatron.hf.configuration_neo import NEOChatConfig
from neo_megatron.hf.modeling_neo import NEOChatModel
from neo_megatron.hf.processing_neo import row_major
from neo_megatron.inference.generation_settings import check_generation_config
from neo_megatron.inference.prompt_forms import ImageText
from neo_megatron.inference.prompts import ImageInput, Prompt, new_prompt

MAX_NEW_TOKENS = 512
_LONGEST_CHARACTER = 4  # bytes in UTF-8, so at most as many tokens share one character


@dataclass(frozen=True)
class Answer:
    """An answer of the model: text and tokens; ``finished`` is False if it was cut at the token limit."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Piece:
    """The next part of an answer: a token, or the tokens that make one character together."""

    text: str
    tokens: tuple[int, ...]


class Answerer:
    """A checkpoint and its tokenizer, ready to answer.

    ``model``, ``tokenizer`` and ``config`` are transformers' own; ``settings`` holds the limits of pixels.

    Args:
        directory: a NEO checkpoint in Hugging Face form, its tokenizer in it; or the id of one on a hub.
        device: "cpu", "cuda", "cuda:1", ...; "auto" spreads the layers over all GPUs, which needs accelerate. By
            default the first GPU, else the CPU.
        dtype: "auto" for that of the weight files, or a name such as "bfloat16".
        attention: which of transformers' attention implementations runs.
        min_pixels, max_pixels: limits of a resized image; by default the checkpoint's.
        allow_pickle: read pickled weights if there are no safetensors; nothing but tensors is loaded from them.
        chat_layout: "neo1_0" asks as the published `chat` of any NEO and of SenseNova-U1 does; "u1" as text of that
            layout is trained, with an empty think block in front of the answer, so that the model does not think.
        sample_tokens: of layout u1, see `PreprocessConfig`.
        system: text of a system turn in front of conversations that have none; "" for none.

    Raises:
        CheckpointError: the directory lacks a file, or a tensor is missing, unexpected or of another shape.
        DataError: the tokenizer is missing or not the model's; the device does not exist.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        allow_pickle: bool = False,
        chat_layout: ChatLayout = "neo1_0",
        sample_tokens: int = PreprocessConfig.sample_tokens,
        system: str = "",
    ) -> None:
        directory = model_directory(str(directory), allow_pickle)
        neo = open_neo(directory, allow_pickle)  # transformers would only warn of missing tensors
        for sentence in neo.said:
            warnings.warn(f"{directory}/config.json: {sentence}", stacklevel=2)
        sizes = neo.sizes
        check_generation_config(directory, sizes.vocab_size)
        self.tokenizer = load_tokenizer(directory)
        self._ids = special_ids(self.tokenizer)
        if (self._ids.image_start, self._ids.image_context) != (
            sizes.image_start_token_id,
            sizes.image_context_token_id,
        ):
            raise DataError(
                f"{directory}: the tokenizer has other ids for <img> and <IMG_CONTEXT> than config.json; "
                "replace it by the tokenizer that the model was trained with"
            )
        self._encoder = ChatEncoder(self.tokenizer.backend_tokenizer.to_str(), self._ids, chat_layout)
        if not is_unicode(system):
            raise DataError("the system turn holds an unpaired surrogate (invalid Unicode); correct it")
        self._system = (Turn("system", as_literal(system), False),) if system else ()
        self.settings = PreprocessConfig(
            min_pixels=min_pixels or sizes.min_pixels,
            max_pixels=max_pixels or sizes.max_pixels,
            image_store="patches",
            chat_layout=chat_layout,
            sample_tokens=sample_tokens,
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device != "auto":
            _check_device(device)
        self.model = NEOChatModel.from_pretrained(
            **_weights(neo),
            config=NEOChatConfig(**sizes.to_hf()),
            dtype=dtype,
            attn_implementation=attention,
            device_map="auto" if device == "auto" else None,
        )
        if device != "auto":
            self.model.to(device)
        self.model.eval()
        self.config = self.model.config
        stops = self.model.generation_config.eos_token_id or []
        # Turns end as in training, also if the configuration has only the end-of-text token.
        self._stops = [self._ids.turn_end, *([stops] if isinstance(stops, int) else stops)]

    def prompt(
        self, question: str | Sequence[Turn], images: Sequence[ImageInput] = (), image_text: ImageText = "written"
    ) -> Prompt:
        """A question and its images within this model's limits of pixels; arguments and errors as `new_prompt`."""
        return new_prompt(question, images, self.settings, image_text)

    def tokens(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Token ids int32 [n] of each prompt, up to the header of the turn to generate."""
        samples = [
            ((*self._with_system(prompt.turns), Turn("assistant", "", True)), [len(image) for image in prompt.images])
            for prompt in prompts
        ]
        # The last trained span begins where the answer does.
        return [encoded.tokens[: encoded.spans[-1, 0]] for encoded in self._encoder.encode(samples)]

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        return turns if turns and turns[0].role == "system" else (*self._system, *turns)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Arguments of ``model.forward`` and ``model.generate`` on the model's device, rows padded on the left."""
        rows = self.tokens(prompts)
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self._ids.pad)
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, length - len(row) :] = torch.from_numpy(row)
            attention_mask[number, length - len(row) :] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        images = [
            row_major(normalise(patches), *grid)
            for prompt in prompts
            for patches, grid in zip(prompt.images, prompt.grids, strict=True)
        ]
        if images:
            inputs["pixel_values"] = torch.from_numpy(np.concatenate(images))
            inputs["grid_hw"] = torch.tensor([grid for prompt in prompts for grid in prompt.grids])
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int = MAX_NEW_TOKENS, **generation: Any
    ) -> list[Answer]:
        """The answers to a batch of prompts, greedy by default.

        Args:
            generation: arguments of transformers' ``generate``, such as ``do_sample=True, temperature=0.7``.
        """
        inputs = self.inputs(prompts)
        rows = self._generate(inputs, max_new_tokens, **generation)[:, inputs["input_ids"].shape[1] :]
        return [self._answer(row) for row in rows.tolist()]

    def stream(
        self, prompt: Prompt, max_new_tokens: int = MAX_NEW_TOKENS, **generation: Any
    ) -> Generator[Piece, None, None]:
        """The answer to a prompt, piece by piece as it is generated; closing the iterator stops the model.

        The texts of the pieces joined are the text that :meth:`answer` gives. Arguments as there, without beams.
        """
        waiting = _TokenQueue()

        def generate() -> None:
            try:
                self._generate(self.inputs([prompt]), max_new_tokens, streamer=waiting, **generation)
            except _Closed:
                pass
            except BaseException as error:  # raised where the stream is read
                waiting.tokens.put(error)
            finally:
                waiting.tokens.put(None)

        worker = threading.Thread(target=generate, name="neo-answer", daemon=True)

        def end() -> None:
            waiting.closed = True
            worker.join()

        worker.start()
        atexit.register(end)  # a thread that computes while Python ends may abort the process
        try:
            yield from self._pieces(waiting.tokens)
        finally:
            atexit.unregister(end)
            end()

    def _generate(self, inputs: dict[str, Tensor], max_new_tokens: int, **generation: Any) -> Tensor:
        settings = {"do_sample": False, "eos_token_id": self._stops, "pad_token_id": self._ids.pad, **generation}
        with torch.inference_mode():
            return self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)

    def _answer(self, row: list[int]) -> Answer:
        end = next((place for place, token in enumerate(row) if token in self._stops), None)
        tokens = tuple(row[:end])
        return Answer(self._text(tokens), tokens, finished=end is not None)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _pieces(self, arriving: "SimpleQueue[int | BaseException | None]") -> Iterator[Piece]:
        tokens: tuple[int, ...] = ()
        while (token := arriving.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if token in self._stops:
                continue
            tokens += (token,)
            text = self._text(tokens)
            if not text.endswith("\ufffd") or len(tokens) == _LONGEST_CHARACTER:
                yield Piece(text, tokens)
                tokens = ()
        if tokens:
            yield Piece(self._text(tokens), tokens)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError if PyTorch was built without CUDA
        reason = str(error).splitlines()[0]
        raise DataError(f"the device {device} cannot be used ({reason}); name one that is here, such as cpu") from error


def _weights(neo: NeoDirectory) -> dict[str, Any]:
    """Arguments by which `from_pretrained` finds the tensors: safetensors, or pickles that were opened safely."""
    source = neo.source
    if os.path.lexists(adapter := source.directory / "adapter_config.json"):
        raise CheckpointError(
            f"{adapter}: peft would change the model by it, unchecked: merge the adapter, or remove it"
        )
    if isinstance(source, PickledDirectory):
        return {
            "pretrained_model_name_or_path": None,
            "state_dict": {name: source.read(name) for name in source.shapes},
        }
    return {"pretrained_model_name_or_path": source.directory, "use_safetensors": True}


class _Closed(Exception):
    """Nobody reads the stream any more."""


class _TokenQueue(BaseStreamer):
    """Takes the tokens of one row out of ``generate`` as they come."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.closed = False
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        if self.closed:
            raise _Closed
        if not self._in_prompt:
            for token in value.flatten().tolist():
                self.tokens.put(token)
        self._in_prompt = False  # the complete prompt comes first

    def end(self) -> None:
        """The queue's end is put there by the thread, also after an error."""
