"""Attention maps of a few questions that are the same for every checkpoint."""

import base64
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch

from neo_megatron.data.image import IMAGE_TOKEN_SIDE, PATCH
from neo_megatron.errors import RejectedSample
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.attention_rows import AttentionWatch
from neo_megatron.inference.batches import Task
from neo_megatron.inference.prompts import Prompt, prompt_of_sample
from neo_megatron.inference.questions import Question
from neo_megatron.inspection.images import ShownImage, jpeg_addresses, pixels_of

SAMPLES = 4
_IMAGE_BYTES = 400_000  # of the images of all samples together


def attention_maps(task: Task, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The answers to the first few questions about one image, and where the model looked for them.

    ``levels`` is base64 of a byte for each image token, 255 at the largest: the attention of the answer's tokens to
    it, a mean over tokens, heads and layers. ``share`` is their sum before scaling, from 0 to 1; ``image`` is the
    ``data:`` address of the image as the model reads it.
    """
    answerer = task.load()
    watch = AttentionWatch(answerer.model)
    found, images = [], []
    for question, prompt in _chosen(task, questions):
        answer, weights = _looked(answerer, watch, prompt, task.max_new_tokens)
        rows, columns = (side * PATCH // IMAGE_TOKEN_SIDE for side in prompt.grids[0])
        images.append(ShownImage(pixels_of(prompt.images[0], rows, columns), 0))
        found.append(
            {
                "data_set": question.source.name,
                "question": question.text,
                "answer": answer,
                "references": question.references,
                "grid": [rows, columns],
                "levels": base64.b64encode((weights / weights.max() * 255).round().byte().numpy()).decode(),
                "share": float(weights.sum()),
            }
        )
    addresses = jpeg_addresses(images, _IMAGE_BYTES)
    return [{**one, "image": address} for one, address in zip(found, addresses, strict=True)]


def _chosen(task: Task, questions: Sequence[Question]) -> Iterator[tuple[Question, Prompt]]:
    """Questions about one image that can be decoded, of all data sets in turn, each image once."""
    by_set: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if len(question.sample.images) == 1 and not question.sample.videos:
            by_set[question.source.name].append(question)
    seen: set[str] = set()
    for question in filter(None, chain.from_iterable(zip_longest(*by_set.values()))):
        name = str(question.sample.images[0])
        if len(seen) == SAMPLES:
            return
        if name in seen:
            continue
        try:
            settings = question.source.settings(task.settings)
            prompt = prompt_of_sample(question.sample, question.turn, settings, task.image_text)
        except RejectedSample:  # the evaluation lists it
            continue
        if len(prompt.images) == 1:
            seen.add(name)
            yield question, prompt


def _looked(answerer: Answerer, watch: AttentionWatch, prompt: Prompt, max_new_tokens: int) -> tuple[str, torch.Tensor]:
    """The answer, and float32 [image tokens]: the attention of its tokens to those of the image."""
    tokens = torch.from_numpy(answerer.tokens([prompt])[0])
    rows = watch.begin((tokens == answerer.config.img_context_token_id).nonzero()[:, 0])
    (answer,) = answerer.answer([prompt], max_new_tokens)
    layers = answerer.config.llm_config.num_hidden_layers
    weights = torch.stack([rows.of_layer(layer).mean(dim=0) for layer in range(layers)]).mean(dim=0)
    return answer.text.strip(), weights
