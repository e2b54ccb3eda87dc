"""The likelihood of given answers, against one complete forward pass over each as training would tokenize it."""

import pytest
import torch
from support.markers import every_variant

from neo_megatron.data.chat import ChatEncoder, special_ids
from neo_megatron.data.conversation import Turn
from neo_megatron.errors import DataError
from neo_megatron.inference.likelihood import answer_likelihoods

ANSWERS = [(0, "a dog"), (0, "B"), (1, "a dog and a cat"), (2, "<|im_end|>"), (0, "yes, it is")]


@pytest.fixture(scope="module")
def prompts(answerer, golden):
    a, b, d = (golden / "images" / f"{letter}.png" for letter in "abd")
    return [answerer.prompt("What is this?", [a]), answerer.prompt("Hi"), answerer.prompt("Same?", [b, d])]


@every_variant
def test_likelihoods_equal_those_of_a_full_forward(answerer, prompts):
    encoder = ChatEncoder(answerer.tokenizer.backend_tokenizer.to_str(), special_ids(answerer.tokenizer))
    found = answer_likelihoods(answerer, prompts, *zip(*ANSWERS, strict=True))
    for (question, answer), likelihood in zip(ANSWERS, found, strict=True):
        prompt = prompts[question]
        image_tokens = [h * w // 4 for h, w in prompt.grids]
        sample = encoder.encode([((*prompt.turns, Turn("assistant", answer, True)), image_tokens)])[0]
        start, end = (int(bound) for bound in sample.spans[-1])
        end -= 2  # the end of the turn and its line
        inputs = answerer.inputs([prompt])
        inputs["input_ids"] = torch.from_numpy(sample.tokens[None, :end]).long()
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = answerer.model(**inputs).logits[0, start - 1 : -1].double()
        tokens = inputs["input_ids"][0, start:]
        expected = logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).sum()
        assert likelihood.tokens == end - start
        assert likelihood.log_probability == pytest.approx(float(expected), abs=1e-4)


def test_the_models_own_answer_is_greedy(answerer, prompts):
    said = answerer.answer(prompts, max_new_tokens=3, min_new_tokens=3)
    texts = [answerer.tokenizer.decode(answer.tokens) for answer in said]
    same = [answerer.tokenizer(text)["input_ids"] == list(one.tokens) for text, one in zip(texts, said, strict=True)]
    assert any(same)  # another way of cutting the text would be another answer
    likelihoods = answer_likelihoods(answerer, prompts, range(3), texts)
    assert all(one.is_greedy for one, kept in zip(likelihoods, same, strict=True) if kept)
    changed = answer_likelihoods(answerer, prompts, range(3), [f"{text}!" for text in texts])
    assert not any(one.is_greedy for one in changed)


def test_an_empty_answer_is_refused(answerer, prompts):
    with pytest.raises(DataError, match="an answer is empty"):
        answer_likelihoods(answerer, prompts, [0, 1], ["yes", ""])
