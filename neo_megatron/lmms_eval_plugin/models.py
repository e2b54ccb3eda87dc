"""The model classes for lmms-eval: one for tasks that are conversations, one for all others.

lmms-eval uses `NeoChat`, which places images where a task has them in the text, or with `--force_simple` `NeoSimple`,
which places them in front of it. Its multiple-choice tasks by likelihood exist in the simple form only.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from neo_megatron.data.config import ChatLayout
from neo_megatron.errors import ConfigError, RejectedSample
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.likelihood import answer_likelihoods
from neo_megatron.inference.prompt_forms import ImageText
from neo_megatron.inference.prompts import Prompt
from neo_megatron.lmms_eval_plugin.conversations import Message, messages_of, turns_and_images
from neo_megatron.lmms_eval_plugin.generation import Generation, generation


class NeoChat(lmms):
    """A NEO checkpoint in Hugging Face form, for tasks in lmms-eval's form of conversations.

    Args:
        pretrained: its directory or hub id.
        batch_size: questions answered together.
        device, device_map: "cuda:1", "cpu", ...; `device_map=auto` spreads the layers over all GPUs. Under `accelerate
            launch` every process takes a GPU of its own and a share of the questions.
        dtype: "auto" for that of the weight files, or a name such as "bfloat16".
        attn_implementation: "sdpa", "eager" or "flex_attention".
        min_pixels, max_pixels: limits of a resized image; by default the checkpoint's.
        system_prompt: a text, or a file that holds it.
        chat_layout: "neo1_0", as the published models are asked; "u1": with an empty think block.
        image_text: where the images of a question stand: "written", "in-order", "numbered" or "referenced"; see
            `neo_megatron.inference.prompt_forms`.

    Raises:
        ValueError, DataError: as `Answerer`; a batch size that is not a number; a layout or form that there is not.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str = "",
        chat_layout: ChatLayout = "neo1_0",
        image_text: ImageText = "written",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("chat_layout", chat_layout, get_args(ChatLayout)),
            ("image_text", image_text, get_args(ImageText)),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r}: the neo plug-in knows {', '.join(known)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch size {batch_size!r}: the neo plug-in needs a number, such as --batch_size 8")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.answerer = Answerer(
            pretrained,
            device=str(self.accelerator.device) if self._world_size > 1 else device_map or device,
            dtype=dtype,
            attention=attn_implementation,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            chat_layout=chat_layout,
        )
        self._image_text = image_text
        self.device = self.answerer.model.device
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self._said: set[str] = set()
        self._unusable: set[tuple] = set()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request; empty, with a warning, if an image cannot be used."""
        asked = [self._generation(request.args) for request in requests]
        results: list[GenerationResult] = [GenerationResult("", TokenCounts(output_tokens=0))] * len(requests)
        began = time.perf_counter()
        for batch in self._batches([repr(one) for one in asked], "Answering"):
            prompts = {number: prompt for number in batch if (prompt := self._prompt(requests[number].args))}
            if not prompts:
                continue
            answers = self.answerer.answer(list(prompts.values()), **asked[batch[0]].arguments)
            for number, answer in zip(prompts, answers, strict=True):
                text = asked[number].cut(answer.text)
                results[number] = GenerationResult(text, TokenCounts(output_tokens=len(answer.tokens)))
        seconds, tokens = time.perf_counter() - began, sum(one.token_counts.output_tokens for one in results)
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / seconds)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError("tasks of likelihood have no form of conversations: add --force_simple")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("the neo plug-in has no tasks of several rounds yet: leave this task out")

    def clean(self) -> None:
        """Frees memory for a judge; called when everything is answered."""
        if self._unusable:
            logger.warning(f"{len(self._unusable)} documents, named above, have images that NEO cannot take")
        del self.answerer
        super().clean()

    def _generation(self, arguments: tuple) -> Generation:
        settings = generation(self._settings(arguments))
        if settings.ignored:
            self._say_once(f"not known to the neo plug-in, and ignored: {', '.join(settings.ignored)}")
        return settings

    def _prompt(self, arguments: tuple) -> Prompt | None:
        *_, doc_id, task, split = arguments
        turns, images, stray = turns_and_images(self._messages(arguments), self.system_prompt)
        if stray:
            self._say_once(f"{task}: its texts hold <image> in other numbers than images; these are left out")
        try:
            return self.answerer.prompt(turns, images, self._image_text)
        except RejectedSample as rejected:
            self._say_once(f"{task}, document {doc_id}: {rejected.sentence}; it is answered with nothing")
            self._unusable.add((task, split, doc_id))
            return None

    def _messages(self, arguments: tuple) -> list[Message]:
        _, doc_to_messages, _, doc_id, task, split = arguments
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def _settings(self, arguments: tuple) -> dict[str, Any]:
        return arguments[2]

    def _batches(self, kinds: Sequence[Any], description: str) -> Iterator[list[int]]:
        """Indices of requests of one kind, as many as fit a batch, kinds in order of appearance."""
        of_kind: dict[Any, list[int]] = {}
        for number, kind in enumerate(kinds):
            of_kind.setdefault(kind, []).append(number)
        with tqdm(total=len(kinds), desc=description, disable=self.rank != 0) as progress:
            for numbers in of_kind.values():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    yield batch
                    progress.update(len(batch))

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning(sentence)


class NeoSimple(NeoChat):
    """The same for tasks in lmms-eval's simple form, with the likelihood of given answers."""

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each given answer the mean cross entropy of its tokens, and whether it is the model's greedy answer.

        A cross entropy despite the name: lmms-eval chooses the smallest of a question, because its own models return
        their loss. It is infinite for every answer about an image that cannot be used.

        The pair is wrapped, because lmms-eval 0.7.3 would turn a bare one into a string and then fail to unpack it.
        """
        results = [(float("inf"), False)] * len(requests)
        for batch in self._batches([None] * len(requests), "Weighing answers"):
            questions = {number: _question(requests[number].args) for number in batch}
            asked = {questions[number]: requests[number].args for number in batch}
            prompts = {key: prompt for key, args in asked.items() if (prompt := self._prompt(args))}
            numbers = [number for number in batch if questions[number] in prompts]
            if not numbers:
                continue
            places = {question: place for place, question in enumerate(prompts)}
            weighed = answer_likelihoods(
                self.answerer,
                list(prompts.values()),
                [places[questions[number]] for number in numbers],
                [self._given_answer(requests[number].args) for number in numbers],
            )
            for number, one in zip(numbers, weighed, strict=True):
                results[number] = (-one.log_probability / one.tokens, one.is_greedy)
        return [GenerationResult(pair) for pair in results]

    def _given_answer(self, arguments: tuple) -> str:
        """The answer without its leading space: in a chat it is at the beginning of a turn."""
        _, answer, _, doc_id, task, split = arguments
        return (answer if isinstance(answer, str) else answer(self.task_dict[task][split][doc_id])).lstrip(" ")

    def _messages(self, arguments: tuple) -> list[Message]:
        text, _, doc_to_visual, doc_id, task, split = arguments
        return messages_of(text, doc_to_visual(self.task_dict[task][split][doc_id]))

    def _settings(self, arguments: tuple) -> dict[str, Any]:
        return arguments[1]


def _question(arguments: tuple) -> tuple:
    """The part that requests for several answers to one question have in common."""
    text, _, _, *document = arguments
    return text, *document
