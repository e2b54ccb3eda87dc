"""Exported checkpoints of the family, and what transformers answers with them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.hf.modeling_neo import NEOChatModel
from neo_megatron.hf.processing_neo import NEOProcessor


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt and of its greedy answer, the logprob of each token of the answer, and its text."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str


@dataclass(frozen=True)
class Reference:
    """The exported checkpoint in transformers, one chat at a time in float32."""

    directory: Path
    model: NEOChatModel
    processor: NEOProcessor

    def answer(self, chat: list[dict[str, Any]], length: int, **limits: int) -> Answer:
        """The first ``length`` tokens of an answer, also after one that ends it."""
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **limits
        )
        output = self.model.generate(
            **inputs, max_new_tokens=length, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        prompt = inputs["input_ids"][0].tolist()
        tokens = output.sequences[0, len(prompt) :].tolist()
        logprobs = torch.stack(output.logits).float().log_softmax(-1)[:, 0].gather(1, torch.tensor(tokens)[:, None])
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(prompt, tokens, logprobs[:, 0].tolist(), text)


@pytest.fixture(scope="session")
def reference_of(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Exports a model of the golden numbers, by its place below their directory."""
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            directory = tmp_path_factory.mktemp("exported")
            convert_hf_to_megatron(golden / name, directory / "megatron")
            convert_megatron_to_hf(directory / "megatron", directory / "hf", load_tokenizer(golden / "tokenizer"))
            model = NEOChatModel.from_pretrained(directory / "hf", dtype=torch.float32).eval()
            model.generation_config.eos_token_id = None
            made[name] = Reference(directory / "hf", model, NEOProcessor.from_pretrained(directory / "hf"))
        return made[name]

    return make
